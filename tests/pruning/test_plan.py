"""Pruning plans: what they take, how they split the layers, and their files."""

import dataclasses
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.cases import random_corrections
from support.plans import contents
from support.tiny import tiny_config

import pop
from pop import InputError, PlanError, PrunePlan, cost
from pop.pruning.plan import POOLED, SELECTING


@pytest.mark.parametrize(
    ("num_layers", "fraction", "count"),
    [(32, 1 / 3, 10), (36, 1 / 3, 12), (48, 1 / 3, 16), (30, 0.5, 15), (100, 0.29, 29), (126, 1 / 3, 42), (5, 0, 0),
     (5, 1, 5), (5, 0.99, 4)],
)  # fmt: skip
def test_deepest_prunes_the_floor_of_the_share(num_layers, fraction, count):
    assert PrunePlan.deepest(num_layers, fraction).layers == tuple(range(num_layers - count, num_layers))


def test_plans_that_ship_were_made_with_these_numbers_of_queries_and_of_averaged_tokens():
    """Other tests use smaller ones, or those of the engine. tests/README.md says what a change of the score needs."""
    assert (SELECTING, POOLED) == (16, 20)


def test_layers_are_stored_sorted_as_python_integers():
    plan = PrunePlan(layers=np.array([4, 2]), full_depth_last=np.int64(3))
    assert plan.layers == (2, 4)
    assert plan == PrunePlan(layers=[2, 4], full_depth_last=3)
    assert all(type(layer) is int for layer in plan.layers)
    assert hash(plan) == hash(PrunePlan((2, 4), 3))


def test_speedup_is_that_of_the_cost_model():
    model = SimpleNamespace(config=tiny_config())
    plan = PrunePlan((2, 4), full_depth_last=3)
    full, pruned = (cost.prefill_flops(model.config, 2048, each) for each in (PrunePlan.none(), plan))
    assert plan.speedup(model, 2048) == full / pruned > 1
    with pytest.raises(PlanError, match="layer 9"):
        PrunePlan((9,)).speedup(model, 2048)
    for wrong in (0, 10**30):
        with pytest.raises(InputError, match=f"prompt_tokens is {wrong}"):
            plan.speedup(model, wrong)


def test_the_share_of_selected_tokens_is_rounded_down():
    plan = PrunePlan((2,), full_depth_selected=0.29)
    assert [plan.num_selected(others) for others in (0, 3, 4, 100)] == [0, 0, 1, 29]
    assert PrunePlan((2,), full_depth_selected=1).num_selected(7) == 7
    assert PrunePlan(full_depth_selected=0.5).num_selected(100) == 0  # nothing is pruned


@pytest.mark.parametrize(("cached", "pruned"), [(0, 68), (1, 68), (4, 67), (90, 7), (101, 0)])
def test_pruned_tokens_are_those_that_are_neither_at_full_depth_nor_selected(cached, pruned):
    """Of 101 tokens, the first three and the last two are at full depth, and 30 % of the others are selected."""
    fields = {"full_depth_first": 3, "full_depth_last": 2, "full_depth_selected": 0.3}
    assert PrunePlan((2, 4), **fields, full_depth_below=101).num_pruned(101, cached) == pruned
    assert PrunePlan((2, 4), **fields, full_depth_below=102).num_pruned(101, cached) == 0
    assert PrunePlan(**fields).num_pruned(101, cached) == 0


@pytest.mark.parametrize(("layers", "layer"), [((1, 3, 4), 1), ((1, 3, 4), 4), ((1, 3), 5), ((), 0), ((0, 1), None)])
def test_a_selecting_layer_is_a_kept_one_before_a_pruned_one(layers, layer):
    """By default it is the one before the first pruned layer."""
    assert [PrunePlan((1, 3, 4), selecting_layer=kept).selects_at for kept in (None, 0, 2)] == [0, 0, 2]
    with pytest.raises(PlanError, match="select"):
        PrunePlan(layers, full_depth_selected=0.5, selecting_layer=layer)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": (1, 1)},
        {"layers": torch.tensor([1.0])},
        {"layers": (-1,)},
        {"layers": (True,)},
        {"layers": "12"},
        {"full_depth_last": 0},
        {"full_depth_first": 2**31},
        {"full_depth_first": -1},
        {"full_depth_below": -1},
        {"full_depth_selected": 8},
        {"full_depth_selected": float("nan")},
        {"full_depth_selected": None},
        {"layers": (2, 3), "selecting_layer": -1},
        {"layers": (2, 3), "selecting_layer": 1.0},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(fields):
    with pytest.raises(PlanError):
        PrunePlan(**fields)


@pytest.mark.parametrize(("num_layers", "fraction"), [(30, -0.1), (30, math.nan), (30, True), (30.0, 0.5)])
def test_a_share_of_layers_that_makes_no_sense_is_refused(num_layers, fraction):
    with pytest.raises(PlanError, match="fraction is|num_layers is"):
        PrunePlan.deepest(num_layers, fraction)


def test_what_stands_for_a_plan(tmp_path, monkeypatch):
    plan = PrunePlan((1,), 3)
    plan.save(tmp_path / "mine.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PrunePlan.of(plan, 6) is plan
    for path in (tmp_path / "mine.json", str(tmp_path / "mine.json"), "~/mine.json"):
        assert PrunePlan.of(path, 6) == PrunePlan.load(path) == plan
    plan.save("~/too.json")
    assert (tmp_path / "too.json").is_file()
    for nothing in (None, "none", 0, "0", 0.0, "0.0"):
        assert PrunePlan.of(nothing, 6) == PrunePlan.none()
    for third in ("third", 1 / 3, "0.34", ".34"):
        assert PrunePlan.of(third, 6).layers == (4, 5)
    for everything in (1.0, "1.0"):
        assert PrunePlan.of(everything, 6).layers == tuple(range(6))
    for listed, layers in (("1,3", (1, 3)), ("2-4", (2, 3, 4)), ("4,0-1", (0, 1, 4)), ("5-4", (4, 5))):
        assert PrunePlan.of(listed, 6) == PrunePlan(layers)


def test_importance_scores_stand_for_the_third_that_prefill_needs_least(tmp_path):
    """Of equal layers, the deeper one is pruned."""
    scores = {"prefill": [5.0, 1.0, 3.0, 1.0, 1.0, 9.0, 4.0], "decode": [1.0] * 7}
    errors = {"prefill_error": [0.1] * 7, "decode_error": [0.1] * 7}
    importance = pop.Importance(**scores, **errors, num_samples=2)
    importance.save(tmp_path / "scores.json")
    for found in (PrunePlan.of(tmp_path / "scores.json", 7), PrunePlan.load(tmp_path / "scores.json")):
        assert found == importance.plan(2) == PrunePlan((3, 4))
    with pytest.raises(PlanError, match="layer 4"):
        PrunePlan.of(tmp_path / "scores.json", 4)
    for wrong in ('[1, "a", 2]', "3", '{"a": 1, "b": 2, "c": 3}', f"[1{'0' * 400}, 2, 3]", "null"):
        (tmp_path / "scores.json").write_text(f'{{"prefill": {wrong}}}')
        with pytest.raises(PlanError, match="not a pruning plan"):
            PrunePlan.of(tmp_path / "scores.json", 7)


@pytest.mark.parametrize(
    "wrong",
    [
        *("default", "deepest", "", "33", "-0.1", "nan", "x" * 5000, "a\0b", [1], b"none", 1, "1", True, False),
        *("1,", ",1", "1--2", "1-2-3", "1, 2", "1,1", "2-6", "7,8", "1-3,2", "1-999999", "99999999999999999999,1"),
    ],
)
def test_what_does_not_stand_for_a_plan_is_refused(wrong):
    with pytest.raises(PlanError):
        PrunePlan.of(wrong, 6)


def test_a_name_that_no_plan_has_is_answered_with_those_that_ship():
    with pytest.raises(PlanError, match=r"gemma3-270m-9, smollm2-135m-14, smollm2-135m-third\)"):
        PrunePlan.of("smollm2-135m-thrid", 30)


def test_a_plan_that_ships_with_the_package_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, plan = "smollm2-135m-third", PrunePlan((1,))
    shipped = PrunePlan.load(name)
    assert shipped.layers == (*range(20, 30),)
    for again in (PrunePlan.of(name, 30), PrunePlan.of(Path(name), 30)):
        assert contents(again) == contents(shipped)
    plan.save("here.plan")
    for path in (f"./{name}", f"{name}.plan", "here"):
        with pytest.raises(PlanError):
            PrunePlan.load(path)
        with pytest.raises(PlanError):
            PrunePlan.of(path, 30)
    plan.save(name)  # a file of the user's comes first
    assert PrunePlan.load(name) == PrunePlan.of(name, 30) == plan


def test_a_record_is_kept_and_changes_nothing(tmp_path):
    about = {"model": "mine", "loss": {"copied": 0.5}, "texts": [1, None]}
    plan = PrunePlan((1,), about=about)
    about["loss"]["copied"] = 1.0
    assert plan.about == {"model": "mine", "loss": {"copied": 0.5}, "texts": [1, None]}
    assert plan == PrunePlan((1,)) and hash(plan) == hash(PrunePlan((1,))) and repr(plan) == repr(PrunePlan((1,)))
    corrections = random_corrections(tiny_config(), (1,), 0)
    for made in (plan, dataclasses.replace(plan, full_depth_first=1, corrections=corrections)):
        made.save(tmp_path / "plan")
        assert PrunePlan.load(tmp_path / "plan").about == {"version": pop.__version__} | plan.about
    PrunePlan((1,), about={"version": "0.0"}).save(tmp_path / "plan")
    assert PrunePlan.load(tmp_path / "plan").about == {"version": "0.0"}
    (tmp_path / "old").write_text('{"layers": [1]}')
    assert PrunePlan.load(tmp_path / "old").about == PrunePlan().about == {}


@pytest.mark.parametrize(
    "about",
    [None, [], "text", {"a": math.nan}, {"a": 1j}, {(1, 2): 3}, {"a": "x" * 10_000}, {"a": {"b": object()}}],
)
def test_a_record_that_is_no_small_object_of_json_is_refused(about, tmp_path):
    with pytest.raises(PlanError, match="about is .*; give a dict"):
        PrunePlan((1,), about=about)
    with pytest.raises(PlanError, match="about is .*; give a dict"):  # it fits only without the version
        PrunePlan((1,), about={"a": "x" * 9_980}).save(tmp_path / "plan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"layers": [1], "gates": 2}', '{"layers": [0.5]}', b"\xff\xfe", "[" * 10**5]
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanError):
        PrunePlan.load(path)
    with pytest.raises(PlanError, match="missing.json"):
        PrunePlan.load(tmp_path / "missing.json")


@pytest.mark.parametrize("path", ["/", None, "missing/plan.json"])
def test_a_path_that_cannot_be_a_file_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=f"{path}"):
        PrunePlan().save(path)
    with pytest.raises(PlanError, match=f"{path}"):
        PrunePlan.load(path)


def test_a_saved_plan_may_be_read_by_others_and_a_link_is_followed(tmp_path):
    corrections = random_corrections(tiny_config(), (1,), 0)
    (tmp_path / "link").symlink_to(tmp_path / "plan")
    os.umask(umask := os.umask(0))
    for plan in (PrunePlan((1,)), PrunePlan((1,), 1, 1, corrections), PrunePlan((1,), 1, 1, corrections, 0.25)):
        plan.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert contents(PrunePlan.load(tmp_path / "plan")) == contents(plan)
        assert (tmp_path / "plan").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_plan_does_not_change_with_its_file(tmp_path):
    """Tensors of a mapped file would, and a shorter file would end the process."""
    path = tmp_path / "my.plan"
    plan = PrunePlan((3, 4), 1, 1, corrections=random_corrections(tiny_config(), (3, 4), seed=1))
    plan.save(path)
    loaded = PrunePlan.load(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place
    for name, tensor in plan.corrections.tensors.items():
        assert torch.equal(loaded.corrections.tensors[name], tensor)
    assert torch.equal(loaded.corrections.sketch, plan.corrections.sketch)
