"""`pop.Importance`: plans made from scores, files, and figures."""

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.importances import assert_same

import pop
from pop import InputError, PlanError, PrunePlan
from pop.calibration.scores import SCORES, Importance, importance


def scores(prefill, decode=None, n=4, **branches):
    decode = prefill if decode is None else decode
    return Importance(prefill, decode, [0.1] * len(prefill), [0.2] * len(decode), n, **branches)


@given(st.lists(st.sampled_from([0.0, 1e-300, 0.5, 1.0, 2.0]) | st.floats(0, 1e10), min_size=1, max_size=9), st.data())
def test_a_plan_takes_what_prefill_needs_least(prefill, data):
    count = data.draw(st.integers(0, len(prefill)))
    plan = scores(prefill, prefill[::-1]).plan(count)
    assert len(plan.layers) == count
    kept = set(range(len(prefill))) - set(plan.layers)
    for layer in plan.layers:
        for other in kept:
            assert prefill[layer] < prefill[other] or (prefill[layer] == prefill[other] and layer > other)


def test_a_plan_takes_the_other_fields_of_a_plan():
    assert scores([3.0, 1.0, 2.0]).plan(2, full_depth_last=8) == PrunePlan((1, 2), full_depth_last=8)


@pytest.mark.parametrize("count", [-1, 4, 1.0, True, None, "all"])
def test_a_plan_of_a_count_out_of_range_is_refused(count):
    with pytest.raises(PlanError, match="count is"):
        scores([3.0, 1.0, 2.0]).plan(count)


def test_saved_scores_come_back(model, samples, tmp_path):
    path = tmp_path / "scores.json"
    for chosen, branches in ((samples, False), (samples, True), (samples[:1], True)):
        result = importance(model, chosen, branches=branches, progress=False)
        result.save(path)
        assert_same(Importance.load(path), result)
    assert result.prefill_error.isnan().all()  # of one sample
    scores([3.0, 1.0], n=np.int64(4)).save(path)
    assert Importance.load(path).num_samples == 4
    assert list(tmp_path.iterdir()) == [path]


def corrupted(change):
    def apply(text):
        fields = json.loads(text)
        change(fields)
        return json.dumps(fields)

    return apply


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "[" * 10**5,
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace("1.5", "Infinity"),
        lambda text: text.replace("1.5", "1e999"),
        lambda text: text.replace("1.5", "-1.5"),
        lambda text: text.replace("1.5", "null"),
        lambda text: text.replace("1.5", '"1.5"'),
        lambda text: text.replace("1.5", "true"),
        lambda text: text.replace("1.5", "[1.5]"),
        corrupted(lambda fields: fields.pop("decode")),
        corrupted(lambda fields: fields.update(more=1)),
        corrupted(lambda fields: fields.update(prefill=2.0)),
        corrupted(lambda fields: fields.update(prefill=[])),
        corrupted(lambda fields: fields["decode_error"].append(1.0)),
        corrupted(lambda fields: fields.update(num_samples=0)),
        corrupted(lambda fields: fields.update(num_samples=2.5)),
        corrupted(lambda fields: fields.update(num_samples=1)),
        corrupted(lambda fields: fields.update(mlp={})),
        corrupted(lambda fields: fields.update(mlp=[1])),
        corrupted(lambda fields: fields["attention"].update(num_samples=3)),
        corrupted(lambda fields: fields["attention"]["prefill"].append(1.0)),
        corrupted(lambda fields: fields.update(attention={name: [1.0] for name in SCORES} | {"num_samples": 4})),
    ],
)
def test_a_file_that_holds_no_scores_is_refused(tmp_path, corrupt):
    path = tmp_path / "scores.json"
    scores([1.5, 2.5], attention=scores([1.0, 2.0])).save(path)
    assert Importance.load(path).attention.prefill.tolist() == [1.0, 2.0]
    path.write_text(corrupt(path.read_text()))
    with pytest.raises(InputError, match="scores.json"):
        Importance.load(path)
    with pytest.raises(InputError, match="No such file"):
        Importance.load(tmp_path / "missing.json")


def test_scores_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        scores([1.0]).save(tmp_path / "missing" / "scores.json")


# ---- The figure, the bar ----


@pytest.mark.parametrize("prefill", [[1.0, 1e-5, 0.0], [0.0, 0.0, 0.0]])
def test_the_figure_is_small_and_the_same_every_time(tmp_path, prefill):
    matplotlib = pytest.importorskip("matplotlib")
    settings, result = dict(matplotlib.rcParams), scores(prefill, [0.0, 0.1, 0.2])
    result.plot(tmp_path / "one.svg")
    with matplotlib.rc_context({"lines.linewidth": 7, "svg.fonttype": "none"}):
        result.plot(tmp_path / "two.svg")
    result.plot(tmp_path / "three.PNG")
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and len(drawn) < 100_000
    assert (tmp_path / "three.PNG").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3
    assert dict(matplotlib.rcParams) == settings


def test_a_figure_of_one_sample_has_no_error_bars(tmp_path):
    pytest.importorskip("matplotlib")
    Importance([1.0, 2.0], [2.0, 1.0], [None, None], [math.nan] * 2, 1).plot(tmp_path / "one.svg")


def test_a_figure_that_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    for name in ("plot", "plot.pdf", ".svg"):
        with pytest.raises(InputError, match="ends in .svg or .png"):
            scores([1.0]).plot(tmp_path / name)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(pop.MissingExtra, match="needs the package matplotlib"):
            scores([1.0]).plot(tmp_path / "plot.svg")
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="cannot be written"):
        scores([1.0]).plot(tmp_path / "missing" / "plot.svg")
