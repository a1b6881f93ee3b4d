"""What calibration decides: sets of layers of a speedup, and the tokens at full depth. The judge is made up."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_corrections
from support.texts import MadeUp, random_texts, windows_of
from support.tiny import tiny_config, tiny_model, tiny_qwen3_vl_config

import pop
from pop import PrunePlan
from pop.calibration import search
from pop.calibration.search import FULL_DEPTH_SHARE, LAST, PROMPT, last_and_selected, with_full_depth
from pop.calibration.texts import total_size

RANK = 15


@pytest.fixture(scope="module")
def deep():
    """A model with 14 layers, which takes prompts of 2,048 tokens."""
    return tiny_model(tiny_config(num_layers=14, max_positions=4096))


@pytest.fixture(scope="module")
def windows():
    return windows_of(random_texts(0, *[300] * 4))


@given(st.data())
def test_layers_apart_are_those_whose_losses_have_the_least_sum(data):
    """They are as few as possible, and among those that lose least alone: four more than are needed, of the three
    quarters of the others that are needed least."""
    num_layers = data.draw(st.integers(3, 14))
    order = data.draw(st.permutations(range(num_layers)))
    alone = data.draw(st.lists(st.integers(0, 9), min_size=num_layers, max_size=num_layers))
    least = data.draw(st.integers(1, num_layers - 1))
    slow = data.draw(st.sets(st.integers(1, num_layers - 1), max_size=3))
    few = data.draw(st.integers(1, num_layers - 1))

    def is_fast(layers) -> bool:
        return len(layers) >= few and not slow <= {*layers}

    def sets_of(count) -> list[tuple[int, ...]]:
        tail = count - max(1, round(0.2 * count))
        allowed = [index for index in order if index and index < num_layers - tail - 1]
        known = sorted(allowed[: round(0.75 * len(allowed))], key=lambda index: alone[index])[: count - tail + 4]
        found = []
        for subset in map(set, itertools.combinations(known, count - tail)):
            layers = (*sorted(subset), *range(num_layers - tail, num_layers))
            if is_fast(layers) and not any({index, index + 1, index + 2} <= subset for index in subset):
                found.append(layers)
        return found

    found = search._with_layers_apart(least, order, is_fast, alone.__getitem__)
    sets = next(filter(None, map(sets_of, range(least, num_layers))), [])
    if not sets:
        assert found is None
        return

    def total(layers) -> int:
        """Sets of equal sums may be in any order."""
        return sum(alone[index] for index in layers)

    assert found in sets and total(found) == min(map(total, sets))


@pytest.mark.parametrize(("least", "num_layers", "expected"), [(15, 24, (1, 2, 4, *range(12, 24))), (1, 6, (1,))])
def test_no_three_layers_apart_are_neighbours_and_one_lies_apart_at_least(least, num_layers, expected):
    found = search._with_layers_apart(least, range(num_layers), lambda layers: True, alone=lambda index: index)
    assert found == expected


def limit(model, plan):
    """The speedup that a plan with corrections allows at 2,048 tokens."""
    corrections = random_corrections(model.config, plan.layers, 0, RANK)
    return dataclasses.replace(plan, corrections=corrections).speedup(model, PROMPT)


class MadeUpAlone(MadeUp):
    """Its quick form has given losses of layers that are pruned alone, [L], and notes which ones it sees: `asked`."""

    def __init__(self, alone, *losses: float):
        super().__init__(*losses)
        self.asked = []
        self.quick = SimpleNamespace(loss=lambda plan: self.asked.extend(plan.layers) or alone[plan.layers[0]].item())

    def on_shortest(self, count, least):
        assert (count, least) == (search.QUICK, 2 * LAST)
        return self.quick


@pytest.mark.parametrize("winner", [0, 1])
def test_the_judge_chooses_one_of_two_sets_of_a_speedup(deep, winner, monkeypatch):
    """The first set is the deepest layers. In the other one, a layer lies apart. The layer that looks up best is kept,
    here layer 2, which loses least and is needed least. A layer alone is fitted to fewer tokens, and judged once."""
    needed, alone = torch.rand(2, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lookups = (torch.arange(14) == 2).double()
    needed[2] = alone[2] = 0
    judge = MadeUpAlone(alone, *(float(number != winner) for number in range(2)))
    counted = []
    sizes = []

    def fake_fitted(model, windows, plan, rank):
        sizes.append((len(plan.layers) > 1, total_size(windows)))
        return [plan]

    monkeypatch.setattr(search, "TOKENS_OF_SET", 900)
    monkeypatch.setattr(search, "TOKENS_OF_LAYER", 300)
    monkeypatch.setattr(search, "fitted", fake_fitted)
    monkeypatch.setattr(search, "_needed", lambda model, samples: needed)
    monkeypatch.setattr(search, "_lookup_scores", lambda model, samples: lookups)
    windows = windows_of(random_texts(0, *[300] * 4))
    found = search.search(deep, windows, judge, 1.5, RANK, counted.append)
    assert found == judge.seen[winner] and counted == [1, 1]
    assert {*sizes} == {(True, 900), (False, 300)}
    least = len(judge.seen[0].layers)
    assert limit(deep, with_full_depth(deep, range(15 - least, 14), windows)) < 1.5  # a layer fewer
    assert judge.seen[0].layers == tuple(range(14 - least, 14))
    for plan in judge.seen:
        count = len(plan.layers)
        tail = count - (plan is not judge.seen[0])  # of a few layers, one lies apart
        assert count >= least and {*plan.layers} >= {*range(14 - tail, 14)}
        assert not {0, 2, 13 - tail} & {*plan.layers}
        assert plan.selecting_layer == 2
        assert limit(deep, plan) >= 1.5 and plan.corrections is None
        assert search._limit(deep, plan, RANK) == limit(deep, plan)  # corrections to come are counted
    assert len(judge.asked) == len({*judge.asked}) > 3


@pytest.mark.parametrize("speedup", [1.5, 1.8])
def test_layers_that_deepstack_separates_are_not_chosen_together(speedup, windows, monkeypatch):
    """The fit would refuse them. The lower layers are the ones that prefill needs least."""
    seeing = tiny_model(tiny_qwen3_vl_config(num_layers=8))
    assert seeing.module.deepstack_layers > 1
    monkeypatch.setattr(search, "_needed", lambda model, samples: torch.arange(8.0, dtype=torch.float64))
    texts = [[token % 50 for token in tokens] for tokens, _ in windows]
    plan = pop.calibrate(seeing, texts, speedup=speedup, steps=0, progress=False)
    assert plan.speedup(seeing, seeing.config.max_positions) >= speedup


def test_gates_are_measured_on_texts_and_on_repeated_passages(deep, windows):
    texts, passages = search._samples(deep, windows)
    assert len(texts) == len(passages) == search.SAMPLES
    for prompt, response in passages:
        size = len(response)
        assert any(prompt[begin : begin + size] == response for begin in range(len(prompt) - size))
    for samples in (texts, passages):
        needed = search._needed(deep, samples)
        assert needed.shape == (14,) and needed.sum() == pytest.approx(1)
        assert needed[:-1].min() > 0 and needed[-1] == 0  # pruning the last layer changes nothing


def test_samples_begin_with_bos_if_the_windows_do(windows):
    """And they are as long as others."""
    model = tiny_model(tiny_config(bos_id=3))
    marked = [([3, *tokens], media) for tokens, media in windows]
    plain, passages = search._samples(model, marked)
    assert {prompt[0] for prompt, _ in plain + passages} == {3}
    assert {len(prompt) + len(response) for prompt, response in plain} == {search.SAMPLE}
    assert len({prompt[0] for prompt, _ in search._samples(model, windows)[0]}) > 1


def test_a_single_layer_cannot_be_skipped(windows):
    model = tiny_model(tiny_config(num_layers=1))
    with pytest.raises(pop.InputError, match="single layer"):
        pop.calibrate(model, [tokens for tokens, _ in windows], progress=False)


@pytest.mark.parametrize("layers", [(3, 9, 10, 13), (0, 1), (12, 13)])
def test_the_tokens_at_full_depth_are_shared_out(deep, windows, layers):
    """Only a kept layer with pruned ones after it can select."""
    plan = with_full_depth(deep, layers, windows)
    assert (plan.layers, plan.full_depth_first) == (layers, 1)
    if layers == (0, 1):  # no layer can select
        assert plan.full_depth_last == round(FULL_DEPTH_SHARE * PROMPT) and not plan.full_depth_selected
        return
    assert plan.full_depth_last == LAST
    assert plan.selecting_layer not in layers and plan.selecting_layer < max(layers)
    total = plan.full_depth_last + plan.full_depth_selected * (PROMPT - plan.full_depth_last)
    assert total == pytest.approx(round(FULL_DEPTH_SHARE * PROMPT), abs=0.1)


@pytest.mark.parametrize("speedup", [1, 0, -2.0, float("nan"), float("inf"), True, "1.4", None, [2.0]])
def test_a_speedup_that_is_none_is_refused(deep, speedup):
    with pytest.raises(pop.InputError, match=r"speedup is .*; it must be a number above 1"):
        pop.calibrate(deep, speedup=speedup)


def test_a_speedup_out_of_reach_is_refused_before_the_work(deep, windows, monkeypatch):
    monkeypatch.setattr("pop.calibration.calibrate.Judge", None)
    last, selected = last_and_selected()
    most = limit(deep, dataclasses.replace(PrunePlan(range(1, 14), last, 1), full_depth_selected=selected))
    for speedup in (6, 50):
        with pytest.raises(pop.InputError, match=f"speedup is {speedup}, but this model allows at most {most:.2f}"):
            pop.calibrate(deep, [tokens for tokens, _ in windows], speedup=speedup, progress=False)
