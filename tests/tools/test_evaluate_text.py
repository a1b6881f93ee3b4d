"""The figures of tools/evaluate on text, and its times, against naive computations."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from support.harness import naive_logits

import pop
from pop.pruning import cost
from tools.evaluate import text
from tools.evaluate.contender import Contender
from tools.evaluate.timing import measure_ttft


def windows_of(count: int, size: int = 30, seed: int = 5) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, 259, size=(count, size)).tolist()


def naive_figures(model, window, plan):
    """Log-probabilities [12, V] that predict the end of a window of 30 tokens, in numpy."""
    return naive_logits(model, plan, window[:18], window[18:]).double().log_softmax(-1).numpy()


def test_text_figures_equal_a_naive_computation(tiny, contenders):
    domains = {"a": windows_of(6), "b": windows_of(5, seed=6)}
    result = text.evaluate_text(contenders, domains, 18, samples=50)
    assert list(result) == ["all", "a", "b"]
    for name, windows in {**domains, "all": domains["a"] + domains["b"]}.items():
        full = np.concatenate([naive_figures(tiny, w, pop.PrunePlan.none()) for w in windows])
        pruned = np.concatenate([naive_figures(tiny, w, contenders[1].plan) for w in windows])
        targets = np.concatenate([w[18:] for w in windows])
        rows = np.arange(len(targets))
        kl = (np.exp(full) * (full - pruned)).sum(-1)
        same = full.argmax(-1) == pruned.argmax(-1)
        perplexities = [np.exp(-log_probs[rows, targets].mean()) for log_probs in (full, pruned)]

        assert (result[name]["windows"], result[name]["continuation_tokens"]) == (len(windows), len(targets))
        figures = result[name]["rows"]
        assert [figures[row]["perplexity"] for row in ("full", "pruned")] == pytest.approx(perplexities, rel=1e-3)
        others = ("perplexity", "by_window")
        row = {key: figure["value"] for key, figure in figures["pruned"].items() if key not in others}
        assert np.mean(figures["pruned"]["by_window"]["kl"]) == pytest.approx(row["kl"])
        assert row["perplexity_change"] == pytest.approx(perplexities[1] / perplexities[0] - 1, abs=1e-3)
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3)
        assert row["kl_first"] == pytest.approx(kl[::12].mean(), rel=1e-3)
        assert row["same"] == pytest.approx(same.mean()) and row["same_first"] == pytest.approx(same[::12].mean())
        assert row["kl"] > 0 and 0 < row["same"] < 1 and row["kl"] != row["kl_first"]
        for figure in (figures["pruned"][key] for key in row):
            assert figure["low"] <= figure["value"] <= figure["high"]


@pytest.mark.parametrize(("windows", "has_interval"), [(5, True), (4, False)])
def test_the_full_model_is_no_distance_from_itself(tiny, contenders, windows, has_interval):
    twin = Contender("twin", tiny, pop.PrunePlan.none())
    result = text.evaluate_text([contenders[0], twin], {"a": windows_of(windows)}, 18)
    assert list(result) == ["a"]  # a single domain is not pooled
    for row in result["a"]["rows"].values():
        for key, value in {"perplexity_change": 0, "kl": 0, "kl_first": 0, "same": 1, "same_first": 1}.items():
            end = value if has_interval else None
            assert row[key] == {"value": value, "low": end, "high": end}


@pytest.mark.parametrize("bos_id", [None, 1])
def test_windows_are_disjoint_and_evenly_spread(bos_id):
    tokens = list(range(100, 203))
    windows = text.spread_windows(tokens, 20, 4, bos_id)
    if bos_id is not None:
        assert all(window[0] == bos_id for window in windows)
        windows = [window[1:] for window in windows]
    length = 20 - (bos_id is not None)
    assert all(window == list(range(window[0], window[0] + length)) for window in windows)
    begins = [window[0] for window in windows]
    assert begins[0] == 100 and windows[-1][-1] == 202
    gaps = np.diff(begins)
    assert gaps.min() >= length and gaps.max() - gaps.min() <= 1
    assert len(text.spread_windows(tokens, 20, 99)) == 5
    assert text.spread_windows(tokens, 104, 1) == []
    assert text.spread_windows(tokens, 50, 1) == [tokens[:50]]


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = text.bootstrap(rng.exponential(2.0, size=60), samples=200, seed=seed)
        covered += low <= 2.0 <= high
    assert 0.9 < covered / 300 < 0.975
    normal = rng.standard_normal(400)
    low, high = text.bootstrap(normal, samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * normal.std() / 20, rel=0.05)  # of a normal mean
    assert text.bootstrap(np.arange(4.0)) == (None, None)
    values = rng.standard_normal(20)
    assert text.bootstrap(values, seed=1) == text.bootstrap(values, seed=1) != text.bootstrap(values, seed=2)
    # Student's interval of 12 values: its half is t s / sqrt(12), with t = 2.201 from the table.
    values = np.array([NormalDist().inv_cdf((n + 0.5) / 12) for n in range(12)])
    low, high = text.bootstrap(values, samples=200_000)
    assert (high - low) / 2 == pytest.approx(2.201 * values.std(ddof=1) / 12**0.5, rel=0.01)


@pytest.fixture
def times(monkeypatch):
    """The seconds that the next prefills of each contender take, by its name. Nothing else moves the clock."""
    times = {}
    now = [0.0]

    def prefill(self, tokens, cache):
        now[0] += times[self.name].pop(0)
        return torch.zeros(3)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Contender, "prefill", prefill)
    return times


def test_ttft_is_the_median_of_runs_in_turn_after_a_warm_up(tiny, contenders, times, notes):
    times |= {"full": [100.0, 8.0, 6.0, 7.0], "pruned": [50.0, 3.0, 9.0, 3.5]}
    calls = notes(Contender, "prefill", lambda contender, *_: contender.name)
    result = measure_ttft(contenders, list(range(40)), 3)
    assert calls == ["full", "pruned"] * 4
    assert result["pruned"]["seconds"] == [3.0, 9.0, 3.5]
    assert result["pruned"]["median_s"] == 3.5 and result["pruned"]["speedup"] == 2.0
    assert (result["pruned"]["fastest_s"], result["pruned"]["slowest_s"]) == (3.0, 9.0)
    assert result["pruned"]["limit"] == pytest.approx(cost.speedup_limit(tiny.config, 40, contenders[1].plan))
    assert result["pruned"]["low"] is result["pruned"]["high"] is None  # three rounds are too few


def test_the_interval_of_a_speedup_pairs_the_rounds(contenders, times):
    """A slow round is slow for all contenders, so it does not widen the interval. Another ratio in some rounds does."""
    rounds = [8.0, 6.0, 16.0, 6.5, 7.0]
    times |= {"full": [1.0, *rounds], "pruned": [1.0, *(seconds / 2 for seconds in rounds)]}
    steady = measure_ttft(contenders, [5], len(rounds))["pruned"]
    assert (steady["low"], steady["speedup"], steady["high"]) == (2.0, 2.0, 2.0)
    times |= {"full": [1.0, *rounds], "pruned": [1.0, 4.0, 4.0, 8.0, 4.0, 3.5]}
    varied = measure_ttft(contenders, [5], len(rounds))["pruned"]
    assert varied["low"] == 6 / 4 < varied["speedup"] == 7 / 4 < varied["high"] == 2
