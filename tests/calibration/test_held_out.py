"""The loss by which calibration chooses: against the naive page, and where a repeated passage comes from."""

import random
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.naive_fit import naive_kl
from support.texts import random_texts, windows_of
from support.tiny import tiny_config, tiny_gemma3_config, tiny_model, tiny_qwen3_moe_config

from pop import PrunePlan
from pop.calibration.held_out import BEGINNING, CUES_IN_PASSAGE, Judge, hold_out, repeated_passage

PLAN = PrunePlan((2, 3), full_depth_first=1)


@pytest.mark.parametrize(
    ("config", "lengths"), [(tiny_gemma3_config(), (60, 400, 31, 16, 5)), (tiny_qwen3_moe_config(), (100,))]
)
def test_the_losses_are_those_of_the_continuation_and_of_the_repeated_passage(config, lengths):
    """By the naive page. The continuation has at most 128 tokens, and a third of the window. A passage comes again."""
    model = tiny_model(config)
    windows = windows_of(random_texts(2, *lengths))
    judge, texts, passages, firsts = Judge(model, windows), [], [], []
    for (window, _), case in zip(windows, judge.cases, strict=True):
        passage = case.passage
        cut = max(len(window) * 2 // 3, len(window) - 128)
        cue = max(1, len(passage) // CUES_IN_PASSAGE)
        assert len(passage) == (min(64, cut // 4) if cut >= 8 else 0)
        kl = naive_kl(model, PLAN, window + passage, cut)
        texts.append(kl[: len(window) - cut + 1])
        firsts.append(texts[-1][:BEGINNING])
        passages.append(kl[len(window) - cut + cue : -1])
        assert len(passages[-1]) == max(0, len(passage) - cue)
    losses = judge.losses(PLAN)
    expected = [torch.cat(texts).mean(), torch.cat(passages).mean(), torch.cat(firsts).mean()]
    expected = [float(mean) for mean in expected]
    assert (losses.continuation, losses.repetition, losses.beginning) == pytest.approx(expected, rel=1e-4)
    assert losses.mean == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert judge.losses(PrunePlan.none()).mean == 0


def test_the_layers_below_the_pruned_ones_run_once(model, notes):
    judge = Judge(model, windows_of(random_texts(2, 60)))
    layers = [*model.module.layers]
    runs = notes(type(layers[0]), "forward", lambda self, *args: layers.index(self))
    losses = [judge.losses(PLAN) for _ in range(2)]
    assert runs == [0, 1] + 2 * [2, 3, 4]
    assert losses[0] == losses[1]
    judge.losses(PrunePlan((1,)))
    assert [[*case.entering] for case in judge.cases] == [[1]], "states of other layers are kept"


def test_a_quick_judge_has_the_shortest_windows(model):
    judge = Judge(model, windows_of(random_texts(2, 60, 30, 90, 45)))
    quick = judge.on_shortest(2, least=30)
    assert [case.prompt_length for case in quick.cases] == [30, 40]
    assert [case.prompt_length for case in judge.on_shortest(2, least=61).cases] == [20, 30], "none is long enough"
    assert [case.prompt_length for case in judge.cases] == [40, 20, 60, 30]
    assert quick.losses(PLAN) != judge.losses(PLAN)


def test_tokens_are_copied_if_they_are_the_likeliest(model):
    windows = [*windows_of(random_texts(2, 60, 45)), ([30] * 70, [])]  # this model repeats token 30
    right = total = 0
    judge = Judge(model, windows)
    for (window, _), case in zip(windows, judge.cases, strict=True):
        passage = case.passage
        tokens = window + passage
        cue = max(1, len(passage) // CUES_IN_PASSAGE)
        answers = model.logits([tokens])[0].argmax(-1)[len(tokens) - len(passage) + cue - 1 : -1]
        right += sum(int(a == b) for a, b in zip(answers, passage[cue:], strict=True))
        total += len(answers)
    assert 0 < right < total
    assert judge.losses(PrunePlan.none()).copied == right / total


@given(st.lists(st.integers(16, 4096), min_size=2, max_size=60), st.sampled_from([512, 2048, 4096]))
def test_windows_of_several_lengths_are_held_out(lengths, longest):
    """They have a fifth of the tokens at most. All others are fitted, but for rests of less than 16 tokens."""
    first = [*accumulate([1, *(min(size, longest) for size in lengths)])]  # each token has a number of its own
    windows = [([*range(begin, end)], []) for begin, end in pairwise(first)]
    left, judged = hold_out(windows, longest, bos_id=0)
    tokens = [token for window, _ in left + judged for token in window]
    assert len(tokens) == len(set(tokens))
    assert all(window == [*range(window[0], window[-1] + 1)] for window, _ in left + judged)
    sizes = [len(window) for window, _ in judged]
    assert first[-1] - 1 - 15 * len(judged) <= len(tokens) <= first[-1] - 1
    assert 1 <= len(judged) <= 9
    assert len(judged) == 1 or sum(sizes) <= (first[-1] - 1) // 5 + sizes[0]


def test_the_rest_of_a_held_out_window_is_fitted_after_bos():
    (rest,), (judged,) = hold_out([([0, *range(1, 1000)], [])], 190, bos_id=0)
    assert judged == ([*range(190)], [])
    assert rest == ([0, *range(190, 1000)], [])


@pytest.mark.parametrize(
    ("media", "count", "size", "longest", "expected"),
    [
        ([], 60, 4096, 4096, [640, 1152, 4096] * 3),
        ([], 60, 4096, 1000, [640, 1000, 1000] * 3),
        ([], 7, 8000, 8000, [640, 1152, 8000, 640, 640]),  # of a window, only what is held out counts
        (["an image"], 60, 4096, 4096, [4096] * 9),  # it stays whole
    ],
)
def test_the_held_out_windows_have_three_lengths(media, count, size, longest, expected):
    _, judged = hold_out([([number] * size, media) for number in range(count)], longest, None)
    assert [len(window) for window, _ in judged] == expected


@pytest.mark.parametrize("spare", [0, 3, 10, 30])
def test_a_continuation_leaves_room_for_the_passage(spare):
    model = tiny_model(tiny_config(), max_seq_len=60 + spare)
    (case,) = Judge(model, windows_of(random_texts(2, 60))).cases
    assert (case.prompt_length, case.continuation_length, len(case.passage)) == (40, min(20, 10 + spare), 10)
    assert len(case.full) == case.continuation_length + len(case.passage)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=3), st.integers(0, 99), st.integers(0, 9))
def test_a_passage_comes_from_the_first_half_of_the_longest_stretch_of_text(images, rest, seed):
    prompt, ranges, stretches = [], [], []
    for text, image in images:
        stretches.append(range(len(prompt), len(prompt) + text))
        prompt += range(len(prompt), len(prompt) + text + image)
        ranges.append(range(len(prompt) - image, len(prompt)))
    stretches.append(range(len(prompt), len(prompt) + rest))
    prompt += stretches[-1]  # each token is its position
    ranges = ranges[::-1]  # videos may follow images that come later
    passage = repeated_passage(prompt, ranges, random.Random(seed))
    longest = max(map(len, stretches))
    assert len(passage) == (min(64, longest // 4) if longest >= 8 else 0)
    if passage:
        assert passage == list(range(passage[0], passage[-1] + 1))
        (home,) = [stretch for stretch in stretches if passage[0] in stretch]
        assert len(home) == longest
        assert home.start < passage[0] and passage[-1] < home.start + longest // 2
