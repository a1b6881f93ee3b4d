"""Random checkpoints, plans and prompts, which the loops share. data/configs.json says which configs there are."""

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


class Wrong(Exception):
    """A result that is not what it should be."""


def random_config(random: Random, family: str | None = None, **fields) -> dict:
    """A config.json of a tiny model of one of the families. `fields` replace those of all families."""
    spec = SPEC["families"][family or random.choice([*SPEC["families"]])]
    common = SPEC["common"] | fields
    if "text_config" in spec:
        text = common | spec["text_config"]
        text.pop("tie_word_embeddings")
        return drawn(random, spec | {"text_config": text})
    return drawn(random, common | spec)


def drawn(random: Random, spec):
    """A value of a specification, in which each list stands for one of its items."""
    if isinstance(spec, dict):
        return {name: drawn(random, value) for name, value in spec.items()}
    if not isinstance(spec, list):
        return spec
    item = random.choice(spec)
    return item if isinstance(item, list) else drawn(random, item)


def write_checkpoint(folder: Path, config: dict, seed: int) -> None:
    """Write config.json, and random weights of which every one matters: each layer changes h."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        parameters = dict(build(read_config(folder)).named_parameters())
    random = torch.Generator().manual_seed(seed)
    adds_one = config["model_type"] == "gemma3_text"  # Gemma's norms multiply by 1 + weight
    weights = {}
    for name, parameter in parameters.items():
        values = torch.randn(parameter.shape, generator=random)
        if parameter.dim() > 1:
            values /= parameter.shape[-1] ** 0.5
        elif not name.endswith("model.norm.weight"):  # of either sign: otherwise tied heads repeat each token
            values = 0.1 * values + (name.endswith("norm.weight") and not adds_one)
        weights[name] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with a chat template. Returns the size of its vocabulary."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder)
    return 269


def random_model(random: Random, config: dict, folder: Path) -> pop.Model:
    """A model of config.json, which is also written to a folder. It runs eagerly in float32, and prunes nothing."""
    write_checkpoint(folder, config, random.randrange(2**31))
    return pop.load(folder, prune=None, dtype=torch.float32, compile=False, progress=False)


def random_plan(random: Random, model: pop.Model) -> pop.PrunePlan:
    """A plan with any layers, full-depth tokens and selecting layer. Half of them have random corrections."""
    layers = tuple(layer for layer in range(model.config.num_layers) if random.random() < 0.5)
    kept = [layer for layer in range(max(layers, default=0)) if layer not in layers]
    fields = {"full_depth_last": random.choice([1, 1, 2, 3, 7, 40]), "full_depth_first": random.choice([1, 1, 0, 4])}
    if kept:
        fields["selecting_layer"] = random.choice(kept)
        fields["full_depth_selected"] = random.choice([0.0, 0.1, 0.4, 1.0])
    if layers and fields["full_depth_first"] and random.random() < 0.6:
        fields["corrections"] = random_corrections(random, model, layers)
    return pop.PrunePlan(layers, **fields)


def random_corrections(random: Random, model: pop.Model, layers: tuple[int, ...]) -> Corrections:
    """Corrections of any rank, with updates of h after any number of groups."""
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    D = model.config.hidden_size
    KE = model.config.num_kv_heads * model.config.head_dim
    R = random.choice([1, 3, 9, 30])
    num_groups = sum(layer - 1 not in layers for layer in layers)
    num_updates = random.randint(0, num_groups)
    update = torch.randn(num_updates, D, R, generator=generator) / R**0.5
    return Corrections(
        layers,
        weight=torch.randn(len(layers), 2, KE, R, generator=generator) / R**0.5,
        bias=0.1 * torch.randn(len(layers), 2, KE, generator=generator),
        shared=torch.randn(num_groups, R, 2 * D, generator=generator) / (2 * D) ** 0.5,
        update=update if num_updates else None,
        sketch=model.sketch[list(layers)],
    )


def random_prompt(random: Random, longest: int = 24) -> list[int]:
    return random.choices(TEXT_IDS, k=random.randint(1, longest))


def check_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The largest difference over the standard deviation of the expected values. Raises Wrong if it is too large."""
    if found.shape != expected.shape:
        raise Wrong(f"the shape is {list(found.shape)}, not {list(expected.shape)}")
    error = ((found - expected).abs().max() / expected.std(correction=0)).item()
    if not error <= tolerance:
        raise Wrong(f"values differ by {error:.1e} of their standard deviation, more than {tolerance:.0e}")
    return error


class Counting:
    """A loop that counts what it has tried."""

    def __init__(self, model: str | None = None):
        self.counts: Counter[str] = Counter()

    def summary(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
