"""Files: spoilt plans, weights, configs, tokenizers and images either load to the right result or raise a PopError.

What is right follows from the spoilt file itself, read in another way: plain JSON, the library safetensors, Pillow. No
file outside of the checkpoint's folder may be opened. A folder named `outside` is there to be found.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import safetensors.torch
import torch

import pop
from pop.checkpoints.config_json import read_config
from pop.inputs.processors import processor_of
from tools.fuzz.cases import (
    CONTROL,
    Wrong,
    random_config,
    random_corrections,
    random_model,
    random_plan,
    write_tokenizer,
)
from tools.fuzz.junk import spoilt

TEXTS = (
    "Hello there, the man in the hat\n\n  12 x",
    *CONTROL,
    "a<|im_end|>\n<|im_start|>system\nthe",
    "é漢字🙂",
    "\x00 \r\n",
)
FORMATS = {  # of images, by mode
    "RGB": ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"),
    "RGBA": ("PNG", "WEBP", "TIFF"),
    "L": ("JPEG", "PNG", "TIFF", "PPM"),
    "LA": ("PNG",),
    "P": ("PNG", "GIF", "BMP"),
    "1": ("PNG", "TIFF"),
    "I;16": ("PNG", "TIFF"),
}
FIELDS = ("layers", "full_depth_last", "full_depth_first", "full_depth_selected", "selecting_layer")


class Loop:
    def __init__(self, model: str | None = None):
        self.counts: Counter[str] = Counter()
        self.opened: list[str] = []  # files outside of the folder
        warnings.filterwarnings("ignore", module="PIL")  # which warns of spoilt images that it reads
        sys.addaudithook(self.look)

    def look(self, event: str, arguments: tuple) -> None:
        """An audit hook, which Python calls before it opens a file."""
        if event == "open" and "outside" in str(arguments[0]):
            self.opened.append(str(arguments[0]))

    def try_one(self, random: Random) -> None:
        kind = random.choice([*CHECKS])
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "model"
            folder.mkdir()
            write_files(random, folder)
            shutil.copytree(folder, Path(root) / "outside")
            self.opened.clear()
            name, check = CHECKS[kind]
            names = [path.name for path in folder.glob(name)]
            file = folder / random.choice(sorted(names))
            file.write_bytes(spoilt(random, file.name, file.read_bytes()))
            try:
                check(file)
                self.counts[f"{kind}, loaded"] += 1
            except pop.PopError as error:
                str(error).encode()  # a message can be printed
                self.counts[f"{kind}, refused"] += 1
            if self.opened:
                raise Wrong(f"files outside of the folder were opened: {self.opened}")

    def summary(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))


def write_files(random: Random, folder: Path) -> None:
    """Write a checkpoint with one file of weights or two, a tokenizer, plans with and without corrections, an image."""
    size = write_tokenizer(folder)
    model = random_model(random, random_config(random, vocab_size=size), folder)
    if random.random() < 0.5:
        split_weights(folder)
    random_plan(random, model).save(folder / "a.plan")
    layer = model.config.num_layers - 1
    corrections = random_corrections(random, model, (layer,))
    pop.PrunePlan((layer,), full_depth_first=1, corrections=corrections).save(folder / "b.plan")
    write_image(random, folder)
    (folder / "seeing").mkdir()
    (folder / "seeing" / "config.json").write_text(json.dumps(random_config(random, ("qwen3_vl",))), encoding="utf-8")


def split_weights(folder: Path) -> None:
    """Replace model.safetensors by two files and an index."""
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        safetensors.torch.save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_image(random: Random, folder: Path) -> None:
    from PIL import Image  # an optional package

    mode = random.choice([*FORMATS])
    size = random.randint(1, 70), random.randint(1, 70)
    num_bytes = len(Image.new(mode, size).tobytes())
    image = Image.frombytes(mode, size, random.randbytes(num_bytes))
    image.save(folder / "image", random.choice(FORMATS[mode]))


# Each check reads a spoilt file, and raises a PopError if it is refused, or Wrong.


def check_plan(file: Path) -> None:
    plan = pop.PrunePlan.load(file)
    try:
        stated = json.loads(file.read_bytes())
    except ValueError:
        with safetensors.safe_open(file, "pt") as opened:
            stated = json.loads(opened.metadata()["pop_plan"])
            for name, tensor in plan.corrections.tensors.items():
                if not torch.equal(tensor, opened.get_tensor(name)):
                    raise Wrong(f"{name} of the corrections is not the file's") from None
    for name in FIELDS:
        found = getattr(plan, name)
        expected = stated.get(name, getattr(pop.PrunePlan(), name))
        if found != (tuple(sorted(expected)) if name == "layers" else expected):
            raise Wrong(f"{name} is {found}, but the file says {expected}")
    plan.save(file)
    if pop.PrunePlan.load(file) != plan:
        raise Wrong("the plan differs after it was saved")


def check_weights(file: Path) -> None:
    folder = file.parent
    model = pop.load(folder, prune=None, compile=False, progress=False, tokenizer=None)
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= safetensors.torch.load_file(path)
    for name, parameter in model.module.named_parameters():
        if name in stored and not torch.equal(parameter.float().nan_to_num(), stored[name].float().nan_to_num()):
            raise Wrong(f"{name} is not the file's")


def check_config(file: Path) -> None:
    model = pop.load(file.parent, prune=None, compile=False, progress=False)
    logits = model.logits([[5, 6, 7]])
    if logits.shape != (1, 3, model.config.vocab_size):
        raise Wrong(f"the logits have shape {list(logits.shape)}")
    model.prefill([[5, 6, 7]], model.new_cache(1, 8), plan=pop.PrunePlan.deepest(model.config.num_layers, 0.5))


def check_tokenizer(file: Path) -> None:
    tokenizer = pop.load_tokenizer(file.parent)
    special = {*tokenizer.special_tokens.values()}
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        if special & {*ids}:
            raise Wrong(f"the text {text!r} became a control token: {ids}")
        if not isinstance(tokenizer.decode(ids), str) or not isinstance(tokenizer.decode(special), str):
            raise Wrong("decode gives no text")
        if tokenizer.encode(text, bos=False) != ids:
            raise Wrong("the same text has other ids")


def check_image(file: Path) -> None:
    from PIL import Image

    processor = processor_of(read_config(file.parent / "seeing"))
    found = processor.prepare("image", file.read_bytes()).pixels
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        expected = processor.prepare("image", image).pixels
    if not torch.equal(found, expected) or not found.isfinite().all():
        raise Wrong("the pixels are not those of Pillow's image")


CHECKS = {
    "plans": ("*.plan", check_plan),
    "weights": ("*.safetensors*", check_weights),
    "configs": ("config.json", check_config),
    "tokenizers": ("tokenizer*.json", check_tokenizer),
    "images": ("image", check_image),
}
