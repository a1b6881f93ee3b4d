"""Refit projections: their input, copies, equality and files, and what is refused. tests/calibration fits them."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import random_refit
from support.tiny import tiny_config

from pop import PlanError, PrunePlan
from pop.pruning.corrections import Corrections


def random_projections(taps: int, layers=(1, 3)) -> Corrections:
    """For a model of width 5 with six rows of K and of V."""
    random = torch.Generator().manual_seed(taps)
    weight, bias = torch.randn(len(layers), 2, 6, taps * 5, generator=random), torch.randn(2, 2, 6, generator=random)
    return Corrections(layers, weight, bias, "", taps)


def test_one_tap_reads_the_token_and_two_taps_also_the_one_before():
    x, previous = torch.arange(15.0).view(1, 3, 5), torch.full((1, 5), -1.0)
    assert random_projections(1).inputs(x, previous, 1) is x
    found = random_projections(2).inputs(x, previous, 1)  # [1, 3, 10]
    assert torch.equal(found[..., :5], x)
    assert torch.equal(found[:, 1:, 5:], x[:, :-1]) and torch.equal(found[:, 0, 5:], previous)


@pytest.mark.parametrize("taps", [1, 2])
def test_a_code_is_a_product_of_the_taps(taps):
    refit, shared = random_projections(taps), torch.randn(2, 3, taps * 5)
    low = Corrections(refit.layers, refit.weight[..., :3].clone(), refit.bias, "", taps, shared)
    x, previous = torch.randn(2, 3, 5), torch.randn(2, 5)
    torch.testing.assert_close(low.inputs(x, previous, 3), refit.inputs(x, previous, 3) @ shared[1].T)
    assert (low.rank, refit.rank) == (3, None)


def test_a_copy_has_the_chosen_rows_and_dtype_and_is_kept():
    refit, cpu = random_projections(2), torch.device("cpu")
    pickled = len(pickle.dumps(refit))
    assert refit.to(cpu, torch.float32) is refit
    part = refit.to(cpu, torch.bfloat16, [4, 1])
    assert torch.equal(part.weight, refit.weight[:, :, [4, 1]].bfloat16())
    assert torch.equal(part.bias, refit.bias[:, :, [4, 1]].bfloat16())
    assert (part.layers, part.taps, part.rows) == (refit.layers, refit.taps, [4, 1])
    assert refit.to(cpu, torch.bfloat16, [4, 1]) is part
    assert refit.to(cpu, torch.bfloat16) is not part
    assert pickle.loads(pickle.dumps(refit)) == refit
    assert len(pickle.dumps(refit)) == pickled  # without the copy


def test_low_rank_projections_are_copied_compared_and_saved_with_their_code(tmp_path):
    refit = random_refit(tiny_config(), (1, 3), -1, 2, rank=7)
    part = refit.to(torch.device("cpu"), torch.bfloat16, [4, 1])
    assert torch.equal(part.weight, refit.weight[:, :, [4, 1]].bfloat16())
    for name in ("shared", "update"):
        assert torch.equal(part.tensors[name], refit.tensors[name].bfloat16())
        assert refit != refit.replaced(refit.tensors | {name: refit.tensors[name] + 1})
    whole = Corrections(refit.layers, refit.weight, refit.bias, refit.fingerprint, 1)
    assert refit != whole and whole != refit
    plan = PrunePlan((1, 3), full_depth_first=1, corrections=refit)
    plan.save(tmp_path / "plan")
    assert PrunePlan.load(tmp_path / "plan") == plan


@pytest.mark.parametrize("shape", [(7,), (6, 60), (7, 61), (7, 60, 1)])
def test_a_code_of_the_wrong_shape_is_refused(shape):
    weight = torch.zeros(2, 2, 20, 7)
    Corrections((2, 3), weight, weight[..., 0], "", 2, torch.zeros(1, 7, 60))
    with pytest.raises(PlanError, match="shared"):
        Corrections((2, 3), weight, weight[..., 0], "", 2, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 30, 7), (1, 31, 7), (1, 30, 60), (30, 7)])
def test_updates_of_the_wrong_shape_are_refused(shape):
    weight, shared = torch.zeros(2, 2, 20, 7), torch.zeros(1, 7, 60)
    Corrections((2, 3), weight, weight[..., 0], "", 2, shared, torch.zeros(1, 30, 7))
    with pytest.raises(PlanError, match="update"):
        Corrections((2, 3), weight, weight[..., 0], "", 2, shared, torch.zeros(shape))


def zeros_projections(weight=(2, 2, 20, 60), bias=(2, 2, 20), taps=2):
    return Corrections((2, 3), torch.zeros(weight), torch.zeros(bias), "", taps)


def test_equality_compares_every_field():
    one = zeros_projections()
    assert one == zeros_projections()
    assert one != Corrections((2, 3), one.weight + 1, one.bias, "", 2)
    assert one != Corrections((2, 3), one.weight, one.bias + 1, "", 2)
    assert one != Corrections((2, 3), one.weight, one.bias, "other", 2)
    assert one != Corrections((2, 3), one.weight, one.bias, "", 1)
    assert one != Corrections((2, 4), one.weight, one.bias, "", 2)
    assert one != Corrections((2, 3), one.weight.bfloat16(), one.bias.bfloat16(), "", 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"full_depth_first": 0},
        {"layers": (2,)},
        {"layers": (2, 4)},  # those of other layers
        {"projections": "refit"},
    ],
)
def test_projections_that_do_not_fit_their_plan_are_refused(fields):
    good = {"layers": (2, 3), "full_depth_first": 1, "projections": zeros_projections()}
    PrunePlan(**good)
    with pytest.raises(PlanError):
        PrunePlan(**good | fields)


@pytest.mark.parametrize(
    "shapes",
    [
        {"weight": (2, 20, 60)},
        {"weight": (2, 3, 20, 60)},
        {"weight": (3, 2, 20, 60), "bias": (3, 2, 20)},
        {"weight": (2, 2, 20, 61)},
        {"bias": (2, 2)},
        {"taps": 3},
        {"taps": True},
    ],
)
def test_projections_of_wrong_shapes_are_refused(shapes):
    with pytest.raises(PlanError):
        zeros_projections(**shapes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", torch.zeros(2, 2, 20, dtype=torch.bfloat16)),  # the weight is float32
        ("bias", torch.full((2, 2, 20), math.inf)),
        ("weight", torch.full((2, 2, 20, 60), math.nan)),
        ("weight", torch.zeros(2, 2, 20, 60, dtype=torch.int64)),
        ("bias", [0.0]),
    ],
)
def test_projections_of_wrong_numbers_are_refused(name, value):
    good = zeros_projections()
    with pytest.raises(PlanError, match="again"):
        Corrections((2, 3), **{"weight": good.weight, "bias": good.bias, name: value}, fingerprint="", taps=2)


@pytest.mark.parametrize("broken", range(14))
def test_a_broken_plan_file_is_refused(tmp_path, broken):
    path = tmp_path / "plan"
    plan = PrunePlan((2, 3), full_depth_first=1, corrections=random_projections(2, (2, 3)))
    plan.save(path)
    assert PrunePlan.load(path) == plan
    tensors, content = load_file(path), path.read_bytes()
    fields = {"layers": [2, 3], "full_depth_last": 1, "full_depth_first": 1, "taps": 2, "fingerprint": "0"}

    def rewrite(tensors=tensors, **changes):
        save_file(tensors, path, metadata={"pop_plan": json.dumps(fields | changes)})

    [
        lambda: path.write_bytes(content[:-1]),
        lambda: path.write_bytes(content[:7]),
        lambda: save_file(tensors, path),
        lambda: rewrite({"weight": tensors["weight"]}),
        lambda: rewrite(tensors | {"weight": tensors["weight"].long()}),
        lambda: rewrite(tensors | {"other": tensors["bias"] + 1}),
        lambda: rewrite(tensors | {"shared": tensors["bias"] + 1}),
        lambda: rewrite(tensors | {"weight": tensors["weight"] * math.inf}),
        lambda: rewrite(taps=0),
        lambda: rewrite(layers=[2]),
        lambda: rewrite(gates=3),
        lambda: rewrite(about=[1]),
        lambda: rewrite(about={"a": math.nan}),
        lambda: save_file(tensors, path, metadata={"pop_plan": '"text"'}),
    ][broken]()
    with pytest.raises(PlanError, match=str(path)):
        PrunePlan.load(path)
