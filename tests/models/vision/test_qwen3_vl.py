"""Qwen3-VL's vision tower: the reference's features, and images apart from each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.goldens import TOLERANCE, Golden, Qwen3VLCase, error, qwen3_vl_cases
from support.tiny import patch_values, random_model, random_patches
from support.torch_calls import calls_of

from pop.models.vision.qwen3_vl import Grid


@pytest.fixture(scope="module")
def towers():
    """The goldens' towers, by name."""
    goldens = {name: Golden(name) for name, _ in qwen3_vl_cases()}
    return {name: random_model(golden.config, golden.seed).model.visual for name, golden in goldens.items()}


@pytest.fixture(scope="module")
def tower(towers):
    return towers["qwen3_vl/untied"]


@pytest.mark.parametrize(("name", "case"), [one for one in qwen3_vl_cases() if one[1] != "text"])
def test_features_are_the_references(towers, name, case):
    case = Qwen3VLCase(name, case)
    for kind, patches in case.patches.items():
        features, deepstack = towers[name](patches, case.grids[kind])
        assert error(features, case.features[kind]) < TOLERANCE
        for layer, expected in zip(deepstack, case.deepstack[kind], strict=True):
            assert error(layer, expected) < TOLERANCE


def test_attention_costs_the_sum_of_the_squares(tower):
    """No mask, and no scores between images: frame pairs of one size are a batch."""
    grids = [Grid(3, 4, 6), Grid(1, 6, 4), Grid(1, 2, 2)]
    _, called = calls_of(tower, random_patches(3 * 24 + 24 + 4, patch_values(tower.config), seed=1), grids)
    attended = [(args, kwargs) for function, args, kwargs in called if function is F.scaled_dot_product_attention]
    assert all(len(args) == 3 and not kwargs for args, kwargs in attended)
    shapes = [args[0].shape for args, _ in attended]
    assert shapes == [shape for shape in [(3, 3, 24, 8), (1, 3, 24, 8), (1, 3, 4, 8)] for _ in range(len(tower.blocks))]


def test_positions_follow_the_weights(tower):
    """They are interpolated from the table at each call."""
    patches, grid = random_patches(24, patch_values(tower.config), 0), [Grid(1, 4, 6)]
    before, _ = tower(patches, grid)
    other = copy.deepcopy(tower)
    other.pos_embed.weight.data.mul_(-1)
    assert not torch.allclose(other(patches, grid)[0], before, atol=0.1)
