"""Figures of importance scores are reproducible. test_mistakes.py has what is refused."""

import math

import pytest

import pop
from tools.plot_importance import main, plot


def scores(prefill, decode=None):
    """Made-up scores with errors of a tenth."""
    decode = prefill if decode is None else decode
    return pop.Importance(prefill, decode, [x / 10 for x in prefill], [x / 10 for x in decode], 5)


def test_the_figure_is_small_and_the_same_every_time(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    settings, result = dict(matplotlib.rcParams), scores([1.0, 1e-5, 0.0], [0.0, 0.1, 0.2])
    plot(result, tmp_path / "one.svg")
    with matplotlib.rc_context({"lines.linewidth": 7, "svg.fonttype": "none"}):
        plot(result, tmp_path / "two.svg")
    plot(result, tmp_path / "three.PNG")
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and len(drawn) < 100_000
    assert (tmp_path / "three.PNG").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == settings
    plot(scores([0.0, 0.0]), tmp_path / "nothing.svg")
    one_sample = pop.Importance([1.0, 2.0], [2.0, 1.0], [None, None], [math.nan] * 2, 1)  # has no error bars
    plot(one_sample, tmp_path / "one_sample.svg")


def test_a_saved_file_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scores([1.0, 0.5]).save(tmp_path / "scores.json")
    assert main([str(tmp_path / "scores.json"), str(tmp_path / "layers.svg")]) == 0
    assert (tmp_path / "layers.svg").read_bytes().startswith(b"<?xml")
    assert main([str(tmp_path / "scores.json"), str(tmp_path / "missing" / "layers.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err
