"""What every family must do, in one table each: match the reference, have the published tensors, and load strictly.

Goldens go through the public API. So they hold config reading, weight loading, the forward pass, the cache and
generation to the reference's numbers. Only what one family has is in test_qwen3_vl.py and vision/.
"""

import dataclasses
import json
import math
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import cases
from support.goldens import GOLDENS, REFUSED, TOLERANCE, Golden, error
from support.published import PUBLISHED
from support.published_vl import SIZES as QWEN3_VL_SIZES
from support.published_vl import published as published_vl
from support.tiny import (
    experts_one_by_one,
    random_model,
    tiny_gemma3_vl_config,
    tiny_qwen3_moe_config,
    tiny_qwen3_vl_config,
)

import pop
from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import MODELS
from pop.checkpoints.weights import load_weights
from pop.errors import CheckpointError
from pop.models import FAMILIES, build
from pop.models import config as configs
from pop.models.config import Config

# Against the reference: tiny random models with awkward sizes. tools/goldens says what is in each.

CASES = [
    f"{family}/{path.parent.name}" for family in FAMILIES for path in sorted((GOLDENS / family).glob("*/golden.json"))
]


def test_every_family_has_goldens():
    assert {case.split("/")[0] for case in CASES} == FAMILIES.keys()


def test_every_family_is_in_the_tables_that_other_tests_read():
    read = filter(None, json.loads((GOLDENS / "config_edits.json").read_bytes())["read as"].values())
    split = json.loads((GOLDENS / "parallel.json").read_bytes()).values()
    fuzzed = json.loads((GOLDENS.parents[1] / "tools/fuzz/data/configs.json").read_bytes())["families"]
    tables = {
        "FAMILIES in tests/support/cases.py": cases.FAMILIES,
        '"read as" in tests/goldens/config_edits.json': {
            getattr(configs, entry["class"]).family for entry in read if entry
        },
        "tests/goldens/parallel.json": {re.sub("_(text|moe)$", "", entry["model_type"]) for entry in split},
        "tools/fuzz/data/configs.json": fuzzed,
        "pop/checkpoints/registry.py": {entry.family for entry in MODELS.values()},
    }
    missing = {table: sorted(FAMILIES.keys() - set(families)) for table, families in tables.items()}
    missing = {table: families for table, families in missing.items() if families}
    assert not missing, f"these tables lack families: {missing}; models/README.md lists what a family needs"


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    folder = golden.checkpoint(tmp_path_factory.mktemp("golden"))
    return pop.load(folder, dtype=torch.float32, prune=None, progress=False)


def test_logits_at_every_position(golden, model):
    for prompt in golden.prompts:
        logits = model.logits([prompt.inputs], **prompt.seen)[0]
        assert error(logits, prompt.logits) < TOLERANCE
        assert logits[len(prompt.tokens) - 1 :].argmax(-1).tolist() == prompt.greedy


def test_greedy_tokens_of_a_batch(golden, model):
    """Prompts of different lengths, with and without images and videos."""
    prompts = golden.prompts
    seen = {kind: [prompt.seen[kind] for prompt in prompts] for kind in prompts[0].seen}
    batch = model.generate([prompt.tokens for prompt in prompts], max_new_tokens=len(prompts[0].greedy), **seen)
    assert [answer.tokens for answer in batch] == [prompt.greedy for prompt in prompts]


@pytest.mark.parametrize("whole", [True, False])
def test_prefill_then_decode(golden, model, whole):
    """In one chunk, and in small ones, which may cut images of Qwen3-VL but not of Gemma-3."""
    chunk_size = 2048 if whole else getattr(getattr(golden.config, "vision", None), "tokens_per_image", 3)
    for prompt in golden.prompts:
        cache = model.new_cache(1, len(prompt.inputs))
        with patch.object(model, "chunk_size", chunk_size):
            steps = [model.prefill([prompt.tokens], cache, **prompt.seen)]
        steps += [model.decode([token], cache) for token in prompt.greedy[:-1]]
        assert error(torch.cat(steps), prompt.logits[len(prompt.tokens) - 1 :]) < TOLERANCE
        expected = len(prompt.inputs) if prompt.next_position is None else prompt.next_position
        assert cache.lengths + cache.rope_offsets == expected  # after an image, positions continue from its longer side


@pytest.mark.parametrize("family", [name for name in FAMILIES if (GOLDENS / name / "bfloat16").exists()])
def test_bfloat16_run(family, tmp_path):
    """Two bfloat16 runs round at different places, so each is judged by its distance from the float32 logits.

    Our root mean square over all positions may exceed the reference's by a quarter.
    """
    golden = Golden(f"{family}/bfloat16")
    model = pop.load(golden.checkpoint(tmp_path), prune=None)
    assert model.dtype == torch.bfloat16  # the checkpoint's own
    ours, reference = [], []
    for prompt in golden.prompts:
        logits = model.logits([prompt.inputs])[0]
        boundary = model.prefill([prompt.inputs], model.new_cache(1, len(prompt.inputs)))
        assert logits.dtype == boundary.dtype == torch.float32
        assert rms([boundary.numpy() - prompt.logits[-1:]]) < 0.05 * prompt.logits[-1].std()
        ours.append(logits.numpy() - prompt.logits)
        reference.append(prompt.stored_dtype_logits - prompt.logits)
    assert rms(ours) < 1.25 * rms(reference)


def rms(errors: list[np.ndarray]) -> float:
    return float(np.sqrt(np.square(np.concatenate(errors)).mean()))


# The published sizes. Models on the meta device take no memory. Sizes without a table of tensors have a count of them.


@pytest.fixture
def read(tmp_path):
    """read(config.json as an object) -> the config."""

    def write_and_read(fields: dict) -> Config:
        (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_config(tmp_path)

    return write_and_read


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(read, name):
    """Of each model in the registry. A new size needs its fields in goldens/published.json or published_vl.py."""
    base = re.sub("-(it|instruct|thinking)$", "", name)
    size = base.removeprefix("qwen3-vl-")
    assert base in PUBLISHED or size in QWEN3_VL_SIZES, "add its config to goldens/published.json or to published_vl.py"
    config = published_vl(size) if size in QWEN3_VL_SIZES else read(PUBLISHED[base])
    found = count(shapes_of(config))
    assert found == MODELS[name].parameters, f"put {found:_} into checkpoints/registry.py"


# For models of text, goldens with files of tensors hold the names.
TENSORS = json.loads((GOLDENS / "tensors.json").read_bytes())


@pytest.mark.parametrize("name", TENSORS)
def test_names_and_shapes_are_the_published_ones(read, name):
    """In the golden file, `layers.0-33.` stands for 34 layers."""
    expected = {}
    for tensor, shape in TENSORS[name].items():
        before, last, after = re.fullmatch(r"(.*?)(?:\.0-(\d+)\.(.*))?", tensor).groups()
        names = [before] if last is None else [f"{before}.{n}.{after}" for n in range(int(last) + 1)]
        expected |= dict.fromkeys(names, tuple(shape))
    assert shapes_of(read(PUBLISHED[name])) == expected


# Loading


def tensors_of(config: Config, seed: int = 3) -> dict[str, torch.Tensor]:
    return dict(random_model(config, seed).state_dict())


def load(folder, config: Config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of the model of `config`, once `tensors` are written to a file in the folder and loaded."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with torch.device("meta"):
        module = build(config)
    load_weights(folder, module, dtype=torch.float32, device="cpu", progress=False)
    return dict(module.named_parameters())


# Prefixes of Gemma-3 with images, by who saved it. The language model's, the tower's and the projector's.
LANGUAGE, TOWER, PROJECTOR = "language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."
SAVED_AS = {
    "published": (LANGUAGE, TOWER, PROJECTOR),
    "tower without vision_model": (LANGUAGE, "vision_tower.", PROJECTOR),
    "prefixed": ("model.language_model.", f"model.{TOWER}", f"model.{PROJECTOR}"),
    "prefixed, tower without vision_model": ("model.language_model.", "model.vision_tower.", f"model.{PROJECTOR}"),
    "bare": ("language_model.", "vision_tower.", PROJECTOR),
}


@pytest.mark.parametrize("saved_as", SAVED_AS)
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_gemma3_loads_under_any_saved_name(tmp_path, saved_as, head):
    """With or without a copy of the embedding as the output head."""
    config = tiny_gemma3_vl_config()
    weights, saved = tensors_of(config), {}
    for name, weight in weights.items():
        for prefix, other in zip(SAVED_AS["published"], SAVED_AS[saved_as], strict=True):
            if name.startswith(prefix):
                saved[other + name.removeprefix(prefix)] = weight
    assert len(saved) == len(weights)
    if head:
        saved[head] = weights[f"{LANGUAGE}embed_tokens.weight"].clone()
    for name, parameter in load(tmp_path, config, saved).items():
        assert torch.equal(parameter, weights[name]), name


def one_by_one(tensors):
    experts_one_by_one(tensors)
    return tensors


MOE, GEMMA, QWEN = tiny_qwen3_moe_config(), tiny_gemma3_vl_config(), tiny_qwen3_vl_config()
SHALLOW_GEMMA = tiny_gemma3_vl_config(windows=GEMMA.windows[:2])
OTHER_QWEN = dataclasses.replace(QWEN, num_layers=4, vision=dataclasses.replace(QWEN.vision, intermediate_size=12))
# The config of a model, and the tensors that are stored.
STORED = {
    "gemma with fewer layers": (GEMMA, tensors_of(SHALLOW_GEMMA)),
    "gemma": (GEMMA, tensors_of(GEMMA)),
    "qwen with another width": (QWEN, tensors_of(OTHER_QWEN)),
    "experts one by one": (MOE, one_by_one(tensors_of(MOE))),
    "experts": (MOE, tensors_of(MOE)),
}


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED["tensors of checkpoints"])
def test_wrong_weights_are_refused_by_name(tmp_path, name, changes, named):
    """`changes` gives tensors of zeros by their shape; None removes a tensor."""
    config, stored = STORED[name]
    stored = stored | {name: torch.zeros(shape) for name, shape in changes.items() if shape}
    stored = {name: tensor for name, tensor in stored.items() if changes.get(name, ()) is not None}
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, config, stored)
    for part in named:
        assert part in str(caught.value)
