"""Files: spoilt plans, weights, configs, tokenizers and images either load to the right result or raise a PopError.

What is right follows from the spoilt file itself, read as plain JSON or by the library safetensors. Weights outside of
the checkpoint's folder are other ones.
"""

import json
from pathlib import Path
from random import Random

import torch
from hypothesis import note
from PIL import Image
from safetensors.torch import load_file

import pop
from pop.inputs.images import load_image
from tools.fuzz.cases import DATA, Counting, random_model, random_plan

TEXTS = json.loads((DATA / "texts.json").read_text(encoding="utf-8"))


class Loop(Counting):
    def try_one(self, random: Random, folder: Path) -> None:
        random_model(random, folder / "outside")
        model = random_model(random, folder / "model")
        index = {"weight_map": {name: "model.safetensors" for name, _ in model.module.named_parameters()}}
        (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
        random_plan(random, model).save(folder / "model/a.plan")
        picture = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 9).convert(random.choice(["L", "RGB"]))
        picture.save(folder / "model/image", random.choice(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
        file = folder / "model" / random.choice([*CHECKS])
        file.write_bytes(spoilt(random, file.read_bytes()))
        note(f"{file.name}: {file.read_bytes()[:5000]}")
        try:
            CHECKS[file.name](file)
            self.counts[f"{file.name} loaded"] += 1
        except pop.PopError as error:
            str(error).encode()  # a message can be printed
            self.counts[f"{file.name} refused"] += 1


def spoilt(random: Random, data: bytes) -> bytes:
    """The content of a file, spoilt as JSON if it is JSON, or in its header if it is of safetensors, or as bytes."""
    if random.random() < 0.3 or b"{" not in (data[:1], data[8:9]):
        at = random.randrange(len(data) + 1)
        end = at + random.choice([0, 1, 2, 8, 100, len(data)])
        return data[:at] + random.randbytes(random.choice([0, 1, 2, 8])) + data[end:]
    begin = 0 if data[:1] == b"{" else 8
    end = begin + int.from_bytes(data[:begin], "little") or len(data)
    content = json.loads(data[begin:end])
    edit(content, random.choice(places(content)), random.choice(TEXTS["junk"]))
    header = json.dumps(content).encode()
    return len(header).to_bytes(8, "little")[:begin] + header + data[end:]


def places(content) -> list[list]:
    """The places of all values in JSON content: lists of names and indices."""
    steps = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    return [[step, *below] for step in steps for below in ([], *places(content[step]))]


def edit(content, place: list, value) -> None:
    """Set or leave out the value at a place in JSON content."""
    *above, last = place
    for step in above:
        content = content[step]
    content[last] = value
    if value == "MISSING":
        del content[last]


# Each check reads a spoilt file, and raises a PopError if it is refused.


def check_plan(file: Path) -> None:
    plan = pop.PrunePlan.load(file)
    if plan.corrections is None:
        stated = json.loads(file.read_bytes())
        expected = {name: stated.get(name, default) for name, default in pop.PrunePlan().fields().items()}
        assert plan.fields() == expected | {"layers": tuple(sorted(expected["layers"]))}, expected
    plan.save(file)
    again = pop.PrunePlan.load(file)
    assert again.fields() == plan.fields()
    if plan.corrections is not None:
        saved = again.corrections.tensors
        assert saved.keys() == plan.corrections.tensors.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in plan.corrections.tensors.items())


def check_model(file: Path) -> None:
    model = pop.load(file.parent, prune=0.5, compile=False, progress=False)
    stored = load_file(file.parent / "model.safetensors")
    for name, weight in model.module.named_parameters():
        expected = stored.get(name, weight).to(weight.dtype)
        assert torch.equal(weight.nan_to_num(), expected.nan_to_num()), name
    model.prefill([[5, 6, 7]], model.new_cache(1, 3))


def check_tokenizer(file: Path) -> None:
    tokenizer = pop.load_tokenizer(file.parent)
    for text in TEXTS["tokenized"]:
        ids = tokenizer.encode(text, bos=False)
        assert not {*tokenizer.special_tokens.values()} & {*ids}, (text, ids)
        tokenizer.decode(ids)


CHECKS = {
    "a.plan": check_plan,
    "model.safetensors": check_model,
    "model.safetensors.index.json": check_model,
    "config.json": check_model,
    "tokenizer.json": check_tokenizer,
    "tokenizer_config.json": check_tokenizer,
    "image": load_image,
}
