"""Random checkpoints and plans, which the loops share. data/configs.json says which configs there are."""

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

import pop
from pop.checkpoints.config_json import read_config
from pop.models import build
from pop.pruning.corrections import Corrections

DATA = Path(__file__).with_name("data")
SPEC = json.loads((DATA / "configs.json").read_text(encoding="utf-8"))
TEXT_IDS = range(60)  # ids in every vocabulary that do not stand for images


class Counting:
    """A loop that counts what it has tried. Its `try_one(random, folder)` raises an exception if a case fails."""

    def __init__(self, model: str | None = None):
        self.counts: Counter[str] = Counter()

    def summary(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def drawn(random: Random, spec):
    """A value of a specification, in which each list stands for one of its items."""
    if isinstance(spec, dict):
        return {name: drawn(random, value) for name, value in spec.items()}
    return random.choice(spec) if isinstance(spec, list) else spec


def random_model(random: Random, folder: Path) -> pop.Model:
    """A model of any family, in float32, without compilation and a plan. Its checkpoint is written to a folder."""
    spec = random.choice([*SPEC["families"].values()])
    config = drawn(random, spec if "text_config" in spec else SPEC["common"] | spec)
    shutil.copytree(DATA / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        weights = dict(build(read_config(folder)).named_parameters())
    for name, parameter in weights.items():  # every one matters: each layer changes h
        weights[name] = normal(*parameter.shape)
        if name.endswith("model.norm.weight"):
            weights[name] *= 5  # so that many have either sign: otherwise tied heads repeat each token
        elif name.endswith("norm.weight") and config["model_type"] != "gemma3_text":  # which adds 1 itself
            weights[name] += 1
    save_file(weights, folder / "model.safetensors")
    return pop.load(folder, prune=None, dtype=torch.float32, compile=False, progress=False)


def random_plan(random: Random, model: pop.Model) -> pop.PrunePlan:
    """A plan with any layers, full-depth tokens and selecting layer. Half of them have random corrections."""
    layers = tuple(layer for layer in range(model.config.num_layers) if random.random() < 0.5)
    kept = [layer for layer in range(max(layers, default=0)) if layer not in layers]
    fields = drawn(random, {"full_depth_last": [1, 7, 40], "full_depth_first": [0, 1, 4], "full_depth_below": [0, 20]})
    if kept:
        fields["selecting_layer"] = random.choice(kept)
        fields["full_depth_selected"] = random.choice([0.0, 0.1, 0.4, 1.0])
    if layers and fields["full_depth_first"] and random.random() < 0.6:
        fields["corrections"] = random_corrections(random, model, layers)
    return pop.PrunePlan(layers, **fields)


def random_corrections(random: Random, model: pop.Model, layers: tuple[int, ...]) -> Corrections:
    """Corrections of any rank, with updates of h after each group that kept layers follow."""
    D = model.config.hidden_size
    KE = model.config.num_kv_heads * model.config.head_dim
    R = random.choice([1, 3, 9, 30])
    num_groups = sum(layer - 1 not in layers for layer in layers)
    num_updates = num_groups - (layers[-1] + 1 == model.config.num_layers)
    return Corrections(
        layers,
        weight=normal(len(layers), 2, KE, R),
        shared=normal(num_groups, R, 2 * D),
        update=normal(num_updates, D, R) if num_updates else None,
        sketch=model.sketch[list(layers)],
    )


def normal(*shape: int) -> torch.Tensor:
    """A random tensor. Its product with a vector is about as large as the vector."""
    return torch.randn(shape) / shape[-1] ** 0.5


def check_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """Return the largest difference in units of the expected values' standard deviation, if it is not too large."""
    error = ((found - expected).abs().max() / expected.std(correction=0)).item()
    assert error <= tolerance, f"values differ by {error:.1e} of their standard deviation, more than {tolerance:.0e}"
    return error
