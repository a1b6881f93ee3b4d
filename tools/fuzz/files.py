"""Files: spoilt plans, weights, configs, tokenizers and images either load to the right result or raise a PopError.

What is right follows from the spoilt file itself, read in another way: plain JSON, the library safetensors, Pillow. No
file outside of the checkpoint's folder may be opened. A folder named `outside` is there to be found.
"""

import io
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pop
from pop.checkpoints.config_json import read_config
from pop.inputs.processors import processor_of
from tools.fuzz import cases
from tools.fuzz.cases import Counting, Wrong
from tools.fuzz.junk import spoilt

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXTS = (*CONTROL, "Hello, the man in the hat\n\n  12 x", f"a{CONTROL[2]}\n{CONTROL[1]}the", "é漢字🙂", "\x00 \r\n")
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")


class Loop(Counting):
    def __init__(self, model: str | None = None):
        super().__init__()
        self.opened: list[str] = []  # files outside of the folder
        warnings.filterwarnings("ignore", module="PIL")  # which warns of spoilt images that it reads
        sys.addaudithook(self.look)

    def look(self, event: str, arguments: tuple) -> None:
        """An audit hook, which Python calls before it opens a file."""
        if event == "open" and "outside" in str(arguments[0]):
            self.opened.append(str(arguments[0]))

    def try_one(self, random: Random) -> None:
        pattern, check = random.choice(CHECKS)
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "model"
            folder.mkdir()
            write_files(random, folder)
            shutil.copytree(folder, Path(root) / "outside")
            self.opened.clear()
            file = random.choice(sorted(folder.glob(pattern)))
            file.write_bytes(spoilt(random, file.name, file.read_bytes()))
            try:
                check(file)
                self.counts[f"{pattern} loaded"] += 1
            except pop.PopError as error:
                str(error).encode()  # a message can be printed
                self.counts[f"{pattern} refused"] += 1
            if self.opened:
                raise Wrong(f"files outside of the folder were opened: {self.opened}")


def write_files(random: Random, folder: Path) -> None:
    """Write a checkpoint with a tokenizer, plans with and without corrections, and an image."""
    size = cases.write_tokenizer(folder)
    model = cases.random_model(random, cases.random_config(random, vocab_size=size), folder)
    if random.random() < 0.5:
        split_weights(folder)
    cases.random_plan(random, model).save(folder / "a.plan")
    corrections = cases.random_corrections(random, model, (0,))
    pop.PrunePlan((0,), full_depth_first=1, corrections=corrections).save(folder / "b.plan")
    width, height = random.randint(1, 70), random.randint(1, 70)
    picture = Image.frombytes("RGB", (width, height), random.randbytes(3 * width * height))
    picture.convert(random.choice(["RGB", "L"])).save(folder / "image", random.choice(FORMATS))


def split_weights(folder: Path) -> None:
    """Replace model.safetensors by two files and an index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


# Each check reads a spoilt file, and raises a PopError if it is refused, or Wrong.


def check_plan(file: Path) -> None:
    plan = pop.PrunePlan.load(file)
    if plan.corrections is None:
        stated = json.loads(file.read_bytes())
    else:
        with safetensors.safe_open(file, "pt") as opened:
            stated = json.loads(opened.metadata()["pop_plan"])
            for name, tensor in plan.corrections.tensors.items():
                if not torch.equal(tensor, opened.get_tensor(name)):
                    raise Wrong(f"{name} of the corrections is not the file's")
    expected = {name: stated.get(name, default) for name, default in pop.PrunePlan().fields().items()}
    expected["layers"] = tuple(sorted(expected["layers"]))
    if plan.fields() != expected:
        raise Wrong(f"the plan has {plan.fields()}, but the file says {expected}")
    plan.save(file)
    if pop.PrunePlan.load(file) != plan:
        raise Wrong("the plan differs after it was saved")


def check_weights(file: Path) -> None:
    model = pop.load(file.parent, prune=None, compile=False, progress=False, tokenizer=None)
    stored = {}
    for path in file.parent.glob("*.safetensors"):
        stored |= load_file(path)
    for name, parameter in model.module.named_parameters():
        if name in stored and not torch.equal(parameter.nan_to_num(), stored[name].to(parameter.dtype).nan_to_num()):
            raise Wrong(f"{name} is not the file's")


def check_config(file: Path) -> None:
    model = pop.load(file.parent, prune=0.5, compile=False, progress=False)
    logits = model.logits([[5, 6, 7]])
    if logits.shape != (1, 3, model.config.vocab_size):
        raise Wrong(f"the logits have shape {list(logits.shape)}")
    model.prefill([[5, 6, 7]], model.new_cache(1, 3))


def check_tokenizer(file: Path) -> None:
    tokenizer = pop.load_tokenizer(file.parent)
    special = {*tokenizer.special_tokens.values()}
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        if special & {*ids}:
            raise Wrong(f"the text {text!r} became a control token: {ids}")
        tokenizer.decode(ids)


def check_image(file: Path) -> None:
    seeing = cases.random_config(Random(0), "qwen3_vl")
    (file.parent / "config.json").write_text(json.dumps(seeing), encoding="utf-8")
    processor = processor_of(read_config(file.parent))
    found = processor.prepare("image", file.read_bytes()).pixels
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        expected = processor.prepare("image", image).pixels
    if not torch.equal(found, expected) or not found.isfinite().all():
        raise Wrong("the pixels are not those of Pillow's image")


CHECKS = (
    ("*.plan", check_plan),
    ("*.safetensors*", check_weights),
    ("config.json", check_config),
    ("tokenizer*.json", check_tokenizer),
    ("image", check_image),
)
