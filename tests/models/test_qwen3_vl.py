"""Qwen3-VL against the reference: positions, the vision tower, and the language model on images and videos.

The goldens are made by tools/goldens/qwen3_vl.py. They go through the public API, that is through pop/inputs/processors.py,
prefill and decode; that the engine does the same whatever the plan, chunks and batch: tests/pruning/test_method.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.published_vl import SIZES, published
from support.tiny import random_patches, random_weights, write_weights
from torch import nn

import pop
from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import lookup
from pop.errors import CheckpointError, InputError
from pop.inputs.processors import Prepared
from pop.models import build
from pop.models.config import Qwen3VisionConfig, Qwen3VLConfig
from pop.models.layers import rotate
from pop.models.qwen3_vl import image_positions
from pop.models.vision import qwen3_vl as qwen3_vl_vision
from pop.models.vision.qwen3_vl import Grid, VisionTower

GOLDENS = Path(__file__).parents[1] / "goldens" / "qwen3_vl"
GOLDEN = {name: json.loads((GOLDENS / name / "golden.json").read_bytes()) for name in ("untied", "tied", "experts")}
CASES = [(name, case) for name, golden in GOLDEN.items() for case in golden["cases"]]
TOLERANCE = 1e-4  # of the standard deviation of the reference's values


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny models by name, loaded from checkpoints of the published names."""
    loaded = {}
    for name in GOLDEN:
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_bytes((GOLDENS / name / "config.json").read_bytes())
        write_weights(folder, read_config(folder), GOLDEN[name]["weights"])
        loaded[name] = pop.load(folder, prune=None, progress=False)
    return loaded


@pytest.fixture(scope="module")
def modules(models):
    return {name: model.module for name, model in models.items()}


def with_weights(module, seed=0):
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    module.load_state_dict(random_weights(shapes, seed, "qwen3_vl"))
    return module.requires_grad_(False).eval()


class Case:
    """A prompt with its greedy answer: tokens, grids and patches of images and of videos, and what comes out."""

    def __init__(self, name: str, case: str):
        golden, config = GOLDEN[name]["cases"][case], read_config(GOLDENS / name)
        arrays = np.load(GOLDENS / name / "arrays.npz")
        self.prompt, self.greedy = golden["tokens"], golden["greedy"]
        self.tokens = self.prompt + self.greedy[:-1]
        self.positions, self.next = torch.tensor(golden["positions"]), golden["next"]
        self.grids = {kind: [Grid(*grid) for grid in golden[f"{kind}s"]] for kind in ("image", "video")}
        self.patches, self.features, self.deepstack = {}, {}, {}
        self.seen = {"images": [], "videos": []}  # as the API takes them, prepared already
        for kind, grids in self.grids.items():
            if grids:
                count, seed = sum(map(np.prod, grids)), golden["seed"] + len(kind) + (kind == "video")
                self.patches[kind] = random_patches(int(count), config.vision.patch_values, seed)
                each = self.patches[kind].split([int(np.prod(grid)) for grid in grids])
                prepared = zip(each, grids, strict=True)
                self.seen[f"{kind}s"] = [Prepared(kind, pixels, (), grid) for pixels, grid in prepared]
                self.features[kind] = arrays[f"{case}_{kind}_features"]
                self.deepstack[kind] = arrays[f"{case}_{kind}_deepstack"]
        self.logits = arrays[f"{case}_logits"]


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest deviation from `expected`, in standard deviations of it."""
    assert found.shape == expected.shape
    return np.abs(found.float().numpy() - expected).max() / expected.std()


# ---- against the reference ----


@pytest.mark.parametrize(("name", "case"), CASES)
def test_positions_are_the_references(name, case):
    case, config = Case(name, case), read_config(GOLDENS / name)
    positions, following = image_positions(case.tokens, config, case.grids["image"], case.grids["video"])
    assert torch.equal(positions, case.positions)
    assert following == case.next


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, case in CASES if case != "text"])
def test_features_are_the_references(modules, name, case):
    case = Case(name, case)
    for kind, patches in case.patches.items():
        features, deepstack = modules[name].model.visual(patches, case.grids[kind])
        assert error(features, case.features[kind]) < TOLERANCE
        for layer, expected in zip(deepstack, case.deepstack[kind], strict=True):
            assert error(layer, expected) < TOLERANCE


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_at_every_position(models, name, case):
    """The plain forward pass, over a prompt and its greedy answer, which the logits choose in turn."""
    case, model = Case(name, case), models[name]
    logits = model.logits([case.tokens], **case.seen)[0]
    assert error(logits, case.logits) < TOLERANCE
    assert logits[len(case.prompt) - 1 :].argmax(-1).tolist() == case.greedy


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("chunk_size", [3, 2048])
def test_prefill_then_decode(models, name, case, chunk_size):
    """Chunks that cut an image, too; behind it positions go on where it ends, not where its tokens do."""
    case, model = Case(name, case), models[name]
    cache = model.new_cache(1, len(case.tokens))
    logits = [model.prefill([case.prompt], cache, chunk_size=chunk_size, **case.seen)]
    logits += [model.decode([token], cache) for token in case.greedy[:-1]]
    assert error(torch.cat(logits), case.logits[len(case.prompt) - 1 :]) < TOLERANCE
    assert cache.lengths + cache.rope_offsets == case.next


@pytest.mark.parametrize("name", GOLDEN)
def test_greedy_tokens_of_a_batch(models, name):
    """All of a model's prompts together, with and without images and videos, and each alone."""
    model, cases = models[name], [Case(name, case) for case in GOLDEN[name]["cases"]]
    seen = {kind: [case.seen[kind] for case in cases] for kind in ("images", "videos")}
    answers = model.generate([case.prompt for case in cases], max_new_tokens=8, **seen)
    assert [answer.tokens for answer in answers] == [case.greedy for case in cases]
    for case in cases:
        assert model.generate(case.prompt, max_new_tokens=8, **case.seen).tokens == case.greedy


def test_rows_that_stay_keep_their_positions(models):
    """Others leave the batch behind the prompt."""
    model, cases = models["untied"], [Case("untied", case) for case in ("text", "image", "image-last")]
    longest = max(len(case.prompt) for case in cases)
    padded = [case.prompt + [0] * (longest - len(case.prompt)) for case in cases]
    cache = model.new_cache(3, longest + 1)
    lengths = [len(case.prompt) for case in cases]
    model.prefill(padded, cache, lengths=lengths, images=[case.seen["images"] for case in cases])
    cache.keep_rows(torch.tensor([2, 1]))
    logits = model.decode([case.greedy[0] for case in (cases[2], cases[1])], cache)
    for ours, case in zip(logits, (cases[2], cases[1]), strict=True):
        assert error(ours, case.logits[len(case.prompt)]) < TOLERANCE


# ---- text alone ----


def test_on_text_it_is_a_qwen3(modules):
    module = modules["untied"]
    positions = torch.arange(300)[None]
    for plain, by_axis in zip(module.rope(positions)[None], module.rope(positions.expand(3, 1, -1))[None], strict=True):
        assert torch.equal(plain, by_axis)
    assert image_positions(range(9), module.config)[0].tolist() == [list(range(9))] * 3


# ---- what holds for any sizes ----


@given(
    st.lists(st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1),
)
def test_positions_by_the_rule(parts):
    """Text steps by one; an image spreads from where it begins, and takes as many steps as its longer side."""
    config = read_config(GOLDENS / "untied")
    tokens, grids, expected, at = [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            tokens += [1] * part
            expected += [(at + n,) * 3 for n in range(part)]
            at += part
            continue
        frames, rows, columns = part
        grids.append(Grid(frames, 2 * rows, 2 * columns))
        for _ in range(frames):
            tokens += [2, *[config.video_id] * (rows * columns)]  # the text between keeps the frames apart
            expected += [(at,) * 3, *((at + 1, at + 1 + y, at + 1 + x) for y in range(rows) for x in range(columns))]
            at += 1 + max(rows, columns)
    positions, following = image_positions(tokens, config, videos=grids)
    assert positions.T.tolist() == [list(position) for position in expected]
    assert following == at


@pytest.mark.parametrize(
    ("tokens", "images", "message"),
    [
        ([1, 60, 60, 2], [], "tokens for more images than are given"),
        ([1, 61, 2], [(1, 2, 2)], "tokens for more video frames than are given"),
        ([1, 60, 60, 2], [(1, 2, 4), (1, 2, 2)], "lacks the tokens of at least one image"),
        ([1, 60, 60, 60], [(1, 2, 4)], "has 3 tokens for an image of 1 x 2 tokens; give it 2"),
    ],
)
def test_placeholders_without_images_and_images_without_placeholders(tokens, images, message):
    with pytest.raises(InputError, match=message):
        image_positions(tokens, read_config(GOLDENS / "untied"), [Grid(*grid) for grid in images])


def test_images_do_not_see_each_other(modules):
    """Nor do the frames of a video; and an image is a video of one frame pair."""
    tower = modules["untied"].model.visual
    grids = [Grid(1, 4, 6), Grid(1, 6, 4), Grid(1, 2, 2), Grid(3, 4, 6), Grid(1, 4, 6)]
    patches = random_patches(sum(map(int, map(np.prod, grids))), tower.config.patch_values, seed=1)
    together = tower(patches, grids)
    alone = []
    for part, grid in zip(patches.split([int(np.prod(grid)) for grid in grids]), grids, strict=True):
        size = grid.rows * grid.columns
        alone += [tower(frame, [grid._replace(frames=1)]) for frame in part.split(size)]
    for n, (whole, deep) in enumerate([(together[0], None), *((layer, 1) for layer in together[1])]):
        parts = [features if deep is None else deepstack[n - 1] for features, deepstack in alone]
        assert (whole - torch.cat(parts)).abs().max() < 1e-4 * whole.std()


def test_attention_costs_the_sum_of_the_squares(modules):
    """No mask, and no scores between images: frame pairs of one size are a batch."""
    tower = modules["untied"].model.visual
    shapes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.scaled_dot_product_attention:
                assert len(args) == 3 and not kwargs
                shapes.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    grids = [Grid(3, 4, 6), Grid(1, 6, 4), Grid(1, 2, 2)]
    with Watch():
        tower(random_patches(3 * 24 + 24 + 4, tower.config.patch_values, seed=1), grids)
    assert shapes == [shape for shape in [(3, 3, 24, 8), (1, 3, 24, 8), (1, 3, 4, 8)] for _ in range(len(tower.blocks))]


def test_patches_are_turned_by_row_and_column(modules):
    """Scores of two patches depend on how many rows and columns lie between them, and on nothing else."""
    tower = modules["untied"].model.visual
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    angles = tower.angles(6, 8)[..., None, :]  # [6, 8, 1, E / 2]
    rope = angles.cos(), angles.sin()
    q, k = (rotate(x.expand(6, 8, 1, 8), rope)[:, :, 0] for x in (q, k))

    def score(a, b):
        return float(q[a] @ k[b])

    assert score((0, 0), (2, 3)) == pytest.approx(score((3, 4), (5, 7)), abs=1e-5)
    assert abs(score((0, 0), (2, 3)) - score((0, 0), (3, 2))) > 1e-3


def test_bfloat16_stays_in_it():
    case = Case("untied", "two-images")
    module = with_weights(build(read_config(GOLDENS / "untied")), GOLDEN["untied"]["weights"]).bfloat16()
    features, deepstack = module.model.visual(case.patches["image"].bfloat16(), case.grids["image"])
    assert {part.dtype for part in (features, *deepstack)} == {torch.bfloat16}
    assert error(features, case.features["image"]) < 0.1  # some 20 roundings of 2 ** -9


# ---- the published sizes and names ----


def parameters(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    counted = sum(int(np.prod(shape)) for shape in parameters(published(size)).values())
    for kind in ("", "-thinking"):
        assert counted == lookup(f"qwen3-vl-{size}{kind}").parameters


def test_names_and_shapes_are_the_published_ones():
    """Of the 8B's files."""
    D, inner, C, vision_inner, E = 4096, 12288, 1152, 4304, 128
    expected = {
        "lm_head.weight": (151_936, D),
        "model.language_model.embed_tokens.weight": (151_936, D),
        "model.language_model.norm.weight": (D,),
        "model.visual.patch_embed.proj.weight": (C, 3, 2, 16, 16),
        "model.visual.patch_embed.proj.bias": (C,),
        "model.visual.pos_embed.weight": (2304, C),
    }
    layer = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_norm": (E,),
        "self_attn.k_norm": (E,),
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (1024, D),
        "self_attn.v_proj": (1024, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (inner, D),
        "mlp.up_proj": (inner, D),
        "mlp.down_proj": (D, inner),
    }
    block = {
        "norm1": (C,),
        "norm2": (C,),
        "attn.qkv": (3 * C, C),
        "attn.proj": (C, C),
        "mlp.linear_fc1": (vision_inner, C),
        "mlp.linear_fc2": (C, vision_inner),
    }
    merger = {"norm": (4 * C,), "linear_fc1": (4 * C, 4 * C), "linear_fc2": (D, 4 * C)}
    for n in range(36):
        expected |= {f"model.language_model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    biased = {f"blocks.{n}.{name}": shape for n in range(27) for name, shape in block.items()}
    biased |= {f"deepstack_merger_list.{n}.{name}": shape for n in range(3) for name, shape in merger.items()}
    biased |= {f"merger.{name}": shape for name, shape in (merger | {"norm": (C,)}).items()}
    for name, shape in biased.items():
        expected[f"model.visual.{name}.weight"] = shape
        expected[f"model.visual.{name}.bias"] = shape[:1]
    assert parameters(published("8b")) == expected


@pytest.mark.parametrize(("name", "tied"), [("untied", False), ("tied", True)])
def test_wrong_weights_are_refused_by_name(tmp_path, name, tied):
    config = read_config(GOLDENS / name)
    assert config.tie_embeddings == tied
    (tmp_path / "config.json").write_bytes((GOLDENS / name / "config.json").read_bytes())
    narrow = Qwen3VisionConfig(**vars(config.vision) | {"intermediate_size": 12})
    write_weights(tmp_path, Qwen3VLConfig(**vars(config) | {"num_layers": 4, "vision": narrow}), 0)
    with pytest.raises(CheckpointError) as caught:
        pop.load(tmp_path, progress=False)
    for part in (
        f"num_hidden_layers is {config.num_layers} but 4 layers are stored",
        "model.visual.blocks.0.mlp.linear_fc1.bias is [12], not",
        "= the sizes of vision_config",
    ):
        assert part in str(caught.value)


def test_a_tower_of_any_sides():
    """More rows than learned positions, and fewer; a single square."""
    config = Qwen3VisionConfig(8, 12, 1, 2, 6, (), position_side=3, patch_size=2)
    tower = with_weights(VisionTower(config))
    table = tower.pos_embed.weight.unflatten(0, (3, 3))

    def positions(rows, columns):
        corners, shares = tower.corners(rows, columns)
        return (tower.pos_embed.weight[corners] * shares[..., None]).sum(2)

    assert torch.allclose(positions(3, 3), table)
    wide = positions(2, 5)
    assert torch.allclose(wide[0], torch.stack([table[0, 0], (table[0, 0] + table[0, 1]) / 2, table[0, 1],
                                                (table[0, 1] + table[0, 2]) / 2, table[0, 2]]), atol=1e-6)  # fmt: skip
    assert torch.allclose(wide[1, 4], table[2, 2])
    features, deepstack = tower(random_patches(4, config.patch_values, 0), [Grid(1, 2, 2)])
    assert features.shape == (1, 6) and deepstack == ()


def test_tables_of_a_size_are_kept_and_the_weights_may_change(monkeypatch):
    config = Qwen3VisionConfig(8, 12, 1, 2, 6, (), position_side=3, patch_size=2)
    tower = with_weights(VisionTower(config))
    patches, grid = random_patches(8, config.patch_values, 0), [Grid(1, 2, 4)]
    before, _ = tower(patches, grid)
    kept = tower.tables(2, 4)
    monkeypatch.setattr(VisionTower, "corners", None)  # what is kept is not made again
    assert torch.equal(tower(patches, grid)[0], before) and tower.tables(2, 4) is kept
    tower.pos_embed.weight.data.mul_(-1)
    after, _ = tower(patches, grid)
    assert not torch.allclose(after, before, atol=0.1)
    monkeypatch.undo()
    assert torch.equal(with_weights_of(tower, VisionTower(config))(patches, grid)[0], after)
    assert tower.to(torch.bfloat16)(patches, grid)[0].dtype == torch.bfloat16
    with torch.inference_mode():
        assert tower.tables(4, 4)[0].is_inference()
    assert not tower.tables(4, 4)[0].is_inference()  # which cannot be trained through, or run by code for the others
    tower._tables.clear()
    monkeypatch.setattr(qwen3_vl_vision, "PATCHES_KEPT", 20)
    for size in ((2, 2), (4, 2), (2, 2), (2, 6)):  # 4, 12, 12 and, with the last, 24 patches
        tower.tables(*size)
    assert [key[:2] for key in tower._tables] == [(2, 6)]


def with_weights_of(module, other):
    other.load_state_dict(module.state_dict())
    return other.requires_grad_(False).eval()
