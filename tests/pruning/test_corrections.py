"""Corrections: codes, copies and files, and what is refused. tests/calibration fits them."""

import json
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import random_corrections
from support.goldens import REFUSED
from support.plans import contents
from support.tiny import tiny_config

from pop import PlanError, PrunePlan
from pop.pruning.corrections import Corrections
from pop.pruning.sketch import SKETCH_SIZE

CPU = torch.device("cpu")
SKETCH = torch.ones(2, 2, SKETCH_SIZE)


def tensors(**changed):
    """For layers 2 and 3 of a model of width 30, with 20 rows of K and of V, and codes of 7 numbers."""
    shapes = {"weight": (2, 2, 20, 7), "shared": (1, 7, 60), "update": (1, 30, 7)}
    made = {name: torch.zeros(shape) for name, shape in shapes.items()} | changed
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def corrections(layers=(2, 3), sketch=SKETCH, **changed):
    return Corrections(layers, **tensors(**changed), sketch=sketch)


def test_groups_of_a_plan_have_the_tensors_of_their_layers():
    layers = (0, 2, 3, 5)
    corrected = random_corrections(tiny_config(num_layers=6), layers, 2)  # kept layers follow two of three groups
    plan = PrunePlan(layers, full_depth_first=1, corrections=corrected)
    groups = plan.groups(6)
    assert [(list(group.layers), group.is_pruned) for group in groups] == [
        ([0], True), ([1], False), ([2, 3], True), ([4], False), ([5], True),
    ]  # fmt: skip
    first, kept, second, _, third = (group.corrections for group in groups)
    assert kept is None
    assert [list(group.layers) for group in PrunePlan.none().groups(2)] == [[0, 1]]
    for number, found in enumerate((first, second, third)):
        assert torch.equal(found.shared, corrected.shared[number])
    assert torch.equal(second.weight[1], corrected.weight[2].flatten(0, 1))  # [2 * K * E, R]
    assert torch.equal(second.update, corrected.update[1]) and third.update is None


def test_features_between_pruned_layers_split_their_group_and_not_its_corrections():
    """Only the last part of such a group updates h."""
    plan = PrunePlan((0, 1, 2), full_depth_first=1, corrections=random_corrections(tiny_config(), (0, 1, 2), -1))
    groups = plan.groups(4, deepstack_layers=2)
    assert [list(group.layers) for group in groups] == [[0], [1], [2], [3]]
    assert all(torch.equal(group.corrections.shared, plan.corrections.shared[0]) for group in groups[:3])
    assert [group.corrections.update is not None for group in groups[:3]] == [False, False, True]


def test_a_copy_has_the_chosen_rows_and_dtype_and_is_kept():
    corrected = random_corrections(tiny_config(), (1, 3), -1)
    assert corrected.to(CPU, torch.float32) is corrected
    part = corrected.to(CPU, torch.bfloat16, [4, 1])
    assert torch.equal(part.weight, corrected.weight[:, :, [4, 1]].bfloat16())
    assert torch.equal(part.shared, corrected.shared.bfloat16())
    assert torch.equal(part.update, corrected.update.bfloat16())
    assert (part.layers, part.rank, part.rows) == (corrected.layers, corrected.rank, [4, 1])
    assert corrected.to(CPU, torch.bfloat16, [4, 1]) is part
    assert corrected.to(CPU, torch.bfloat16) is not part
    again = pickle.loads(pickle.dumps(corrected))
    assert again.layers == corrected.layers and torch.equal(again.sketch, corrected.sketch)
    for name, tensor in corrected.tensors.items():
        assert torch.equal(again.tensors[name], tensor)


def test_plans_with_corrections_are_equal_if_they_share_them():
    shared = corrections()
    one = PrunePlan((2, 3), full_depth_first=1, corrections=shared)
    assert one == PrunePlan((2, 3), full_depth_first=1, corrections=shared)
    assert one != PrunePlan((2, 3), full_depth_first=1, corrections=corrections())
    assert len({one, PrunePlan((2, 3), full_depth_first=1, corrections=shared)}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"full_depth_first": 0},
        {"layers": (2,)},
        {"layers": (3, 4)},  # those of other layers
        {"corrections": "corrections"},
    ],
)
def test_corrections_that_do_not_fit_their_plan_are_refused(fields):
    good = {"layers": (2, 3), "full_depth_first": 1, "corrections": corrections()}
    PrunePlan(**good)
    with pytest.raises(PlanError):
        PrunePlan(**good | fields)


@pytest.mark.parametrize(("name", "shape"), REFUSED["shapes of corrections"])
def test_tensors_of_wrong_shapes_are_refused(name, shape):
    corrections()
    with pytest.raises(PlanError, match=name):
        corrections(**{name: torch.zeros(shape)})


@pytest.mark.parametrize("num_updates", [None, 1, 2, 3])
def test_h_is_updated_after_all_groups_but_possibly_the_last(num_updates):
    update = None if num_updates is None else torch.zeros(num_updates, 30, 7)
    tensors = {"weight": torch.zeros(3, 2, 20, 7), "shared": torch.zeros(2, 7, 60)}
    context = nullcontext() if num_updates in (1, 2) else pytest.raises(PlanError, match="update|shared")
    with context:
        corrections((1, 3, 4), torch.ones(3, 2, SKETCH_SIZE), update=update, **tensors)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shared", torch.zeros(1, 7, 60, dtype=torch.bfloat16)),  # the weight is float32
        ("shared", torch.full((1, 7, 60), math.inf)),
        ("weight", torch.full((2, 2, 20, 7), math.nan)),
        ("weight", torch.zeros(2, 2, 20, 7, dtype=torch.int64)),
        ("shared", [0.0]),
    ],
)
def test_tensors_of_wrong_numbers_are_refused(name, value):
    with pytest.raises(PlanError, match="again"):
        corrections(**{name: value})


def test_a_plan_with_transposed_tensors_can_be_saved(tmp_path):
    """As a solver gives them."""
    transposed = torch.arange(7 * 60.0).view(1, 60, 7).mT  # [1, 7, 60]
    plan = PrunePlan((2, 3), full_depth_first=1, corrections=corrections(shared=transposed))
    plan.save(tmp_path / "plan")
    assert contents(PrunePlan.load(tmp_path / "plan")) == contents(plan)


def write_plan(path, tensors, fields):
    save_file(tensors, path, metadata={"pop_plan": json.dumps(fields)})


BREAK = {
    "cut off": lambda path, tensors, fields: path.write_bytes(path.read_bytes()[:-1]),
    "no fields": lambda path, tensors, fields: save_file(tensors, path),
    "text for fields": lambda path, tensors, fields: write_plan(path, tensors, "text"),
    "a missing tensor": lambda path, tensors, fields: write_plan(path, {"weight": tensors["weight"]}, fields),
    "another tensor": lambda path, tensors, fields: write_plan(path, tensors | {"other": torch.ones(1)}, fields),
    "other layers": lambda path, tensors, fields: write_plan(path, tensors, fields | {"layers": [2]}),
    "another field": lambda path, tensors, fields: write_plan(path, tensors, fields | {"gates": 3}),
    "NaN": lambda path, tensors, fields: write_plan(path, tensors, fields | {"about": {"a": math.nan}}),
}


@pytest.mark.parametrize("broken", BREAK)
def test_a_broken_plan_file_is_refused(tmp_path, broken):
    path = tmp_path / "plan"
    PrunePlan((2, 3), full_depth_first=1, corrections=corrections()).save(path)
    tensors, fields = load_file(path), {"layers": [2, 3], "full_depth_last": 1, "full_depth_first": 1}
    write_plan(path, tensors, fields)
    PrunePlan.load(path)
    BREAK[broken](path, tensors, fields)
    with pytest.raises(PlanError, match=f"{path}.*'other'" if broken == "another tensor" else str(path)):
        PrunePlan.load(path)
