"""Images in answers, prefixes, importance and calibration, in both families."""

import dataclasses
import itertools
import random

import pytest
import torch
from support.cases import assert_close, random_corrections
from support.gated_loss import slopes
from support.naive_fit import assert_fit, fitted, naive_fit, naive_gradients, naive_kl
from support.nightly import thinned
from support.tiny import patch_values, random_model, random_patches, tiny_gemma3_vl_config, tiny_qwen3_vl_config
from support.tiny_images import picture

import pop
from pop.calibration.distill import distillation_loss
from pop.calibration.exercises import CONTINUATION, Exercise
from pop.calibration.exercises import exercise as make_exercise
from pop.calibration.held_out import Judge
from pop.calibration.importance import Sample, gate_gradients
from pop.calibration.texts import text_windows
from pop.errors import InputError
from pop.inputs.processors import Prepared
from pop.models.vision.qwen3_vl import Grid
from pop.pruning.reference import selected_tokens

pytestmark = pytest.mark.usefixtures("short_averages")
FAMILIES = {"gemma3": tiny_gemma3_vl_config, "qwen3_vl": tiny_qwen3_vl_config}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config = FAMILIES[request.param]()
    return pop.Model(random_model(config, seed=2), config, plan=pop.PrunePlan((0, 1, 3)), compile=False)


def prepared(model, number):
    """The prepared image number `number`. Qwen3-VL's images have different sizes."""
    if model.config.family == "gemma3":
        (one,) = model.vision.prepare_batch([picture(28, number)], None, 1)[0]
        return one
    vision, rows, columns = model.config.vision, 2 + 2 * (number % 2), 4
    ids = [62, *[60] * (rows * columns // 4), 63]
    pixels = random_patches(rows * columns, patch_values(vision), number)
    return Prepared("image", pixels, (ids,), Grid(1, rows, columns))


def tokens_of(*parts):
    """Token ids, with those of images in their places."""
    tokens = []
    for part in parts:
        lists = [[part]] if isinstance(part, int) else [piece for piece in part.pieces if isinstance(piece, list)]
        tokens += itertools.chain.from_iterable(lists)
    return tokens


def images_of(model, tokens, ones):
    return model.vision.images(model.module, [ones], torch.tensor([tokens]), torch.tensor([len(tokens)]))


def test_answers_contain_no_image_tokens(model, monkeypatch):
    """Tokens that stand for images need images, so a prompt with such an answer would be refused."""
    shown = torch.tensor([*model.vision.placeholders.values()])
    head = model.module.head
    monkeypatch.setattr(model.module, "head", lambda h: head(h).index_fill(-1, shown, 1e4))
    for temperature in (0.0, 1.0):
        answers = model.generate([[2, 5], [7, 8, 9]], max_new_tokens=4, temperature=temperature, seed=0)
        assert all(token not in answer.tokens for answer in answers for token in shown)
        assert model.generate([2, 5, *answers[0].tokens], max_new_tokens=1)


@pytest.mark.parametrize("last", thinned([1, 2, 4, 7, 11, 40], [0, 3, 5]))
def test_a_prefix_with_images_and_a_rest_with_images_are_one_prompt(model, last):
    """The prefix's last full-depth tokens may begin in text, at 0, or in an image, which is then not encoded ahead."""
    a, b, c = (prepared(model, number) for number in range(3))
    tokens = tokens_of(2, 5, a, 7, 8, b, 9)
    plan = dataclasses.replace(model.plan, full_depth_last=last)
    prefix = model.prefix(tokens, images=[a, b], plan=plan)
    ahead = 0 if prefix._cache is None else int(prefix._cache.lengths[0])
    placeholder = tokens_of(a)[1]
    assert ahead <= max(0, len(tokens) - last + 1)
    assert tokens[max(0, ahead - 1) : ahead + 1] != [placeholder] * 2, "an image is cut"
    rests, rows = [[4], tokens_of(6, c, 3, a)], [None, [c, a]]
    expected = [
        model.generate(tokens + rest, images=[a, b, *(row or [])], max_new_tokens=3, plan=plan)
        for rest, row in zip(rests, rows, strict=True)
    ]
    for rest, row, answer in zip(rests, rows, expected, strict=True):
        found = prefix.generate(rest, images=row, max_new_tokens=3)
        assert (found.tokens, found.prompt_tokens) == (answer.tokens, answer.prompt_tokens)
    together = prefix.generate(rests, images=rows, max_new_tokens=3)
    assert [one.tokens for one in together] == [one.tokens for one in expected]


def test_gradients_with_images_are_the_slopes_of_the_gated_loss(model):
    """In a batch of a prompt with two images and one without images."""
    a, b = prepared(model, 0), prepared(model, 1)
    samples = [  # in a response, the image's token is not an image
        Sample(tokens_of(2, a, 5, b, 9), [11, tokens_of(a)[1], 13], [a, b], (0, 0)),
        Sample([2, 7, 8], [14, 15], [], (0, 1)),
    ]
    for found, sample in zip(gate_gradients(model, samples), samples, strict=True):
        expected = slopes(model, *sample[:3])
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_importance_of_samples_with_images(model):
    """Scores are mean squares, and sampled responses depend on the images."""
    a, b = prepared(model, 0), prepared(model, 2)
    samples, rows = [tokens_of(2, a, 9), ([2, 7], [8]), (tokens_of(2, 5, b, 9), [11, 12])], [[a], None, [b]]
    options = {"response_tokens": 3, "progress": False}
    scores = pop.importance(model, samples, images=rows, **options)
    assert (scores.prefill[:-1] > 0).all() and scores.num_samples == 3
    given = pop.importance(model, samples[1:], images=rows[1:], response_tokens=3, progress=False)
    by_hand = [
        gate_gradients(model, [Sample(prompt, response, row or [], (0, 0))])[0]
        for (prompt, response), row in zip(samples[1:], rows[1:], strict=True)
    ]
    assert_close(torch.stack([given.prefill, given.decode]), torch.stack(by_hand).square().mean(0))
    swapped = [[b if one is a else a for one in row or []] for row in rows]
    others = pop.importance(model, samples, images=swapped, **options)
    assert not torch.equal(others.prefill, scores.prefill)
    with pytest.raises(InputError, match="sample 0 .* the prompt has runs"):
        pop.importance(model, samples[:1])


def texts(model):
    """Windows of 20 to 34 tokens, two of three with images, and the images of each."""
    drawn, windows, rows = torch.Generator().manual_seed(4), [], []
    for number in range(12):
        ones = [prepared(model, number * 3 + n) for n in range(number % 3)]
        text = torch.randint(3, 50, (18,), generator=drawn).tolist()
        windows.append(tokens_of(2, *text[:5], *ones, *text[5:]))
        rows.append(ones)
    return windows, rows


@pytest.mark.parametrize("layers", thinned([(0, 1, 2, 4), (1, 3), (4,)], [0, 1]))
def test_the_normal_equations_with_images_give_the_naive_fit(model, layers):
    """A group of pruned layers ends at a layer after which DeepStack adds features."""
    windows, rows = texts(model)
    plan = pop.PrunePlan(layers, full_depth_first=1)
    if {0, 1} <= {*layers} and model.module.deepstack_layers:
        with pytest.raises(pop.PlanError, match="DeepStack"):
            pop.calibrate(model, [], plan)  # before it looks at the texts
        return
    found = fitted(model, text_windows(model, windows, rows, None, 1024), plan, ridge=0.1)
    images = [images_of(model, *pair) for pair in zip(windows, rows, strict=True)]
    assert_fit(model.module, found.corrections, *naive_fit(model, windows, found, 0.1, images))


def test_the_judge_continues_after_the_last_image(model):
    a, b = prepared(model, 0), prepared(model, 1)
    plan, texts, passages = pop.PrunePlan((1, 3), full_depth_first=1), [], []
    windows = [
        (tokens_of(2, a, *range(3, 21)), [a]),
        (tokens_of(2, *range(3, 21), b, 5, 6), [b]),
        (tokens_of(2, b), [b]),
    ]
    judge = Judge(model, windows)
    for number, ((window, ones), case) in enumerate(zip(windows, judge.cases, strict=True)):
        passage = case.passage
        cut = [len(window) * 2 // 3, 19 + len(tokens_of(b)) - 1, len(window) - 1][number]
        assert case.prompt_length == cut
        kl = naive_kl(model, plan, window + passage, cut, images_of(model, window, ones))
        texts.append(kl[: len(window) - cut + 1])
        passages.append(kl[len(window) - cut + 1 : -1])
        assert len(passages[-1]) == max(0, len(passage) - 1)  # short passages: a cue of one token
    expected = float(torch.cat(texts).mean()), float(torch.cat(passages).mean())
    assert [len(case.passage) > 1 for case in judge.cases] == [True, True, False]
    assert judge.losses(plan)[:2] == pytest.approx(expected, rel=1e-4)
    tight = pop.Model(model.module, model.config, max_seq_len=len(windows[1][0]), compile=False)
    (case,) = Judge(tight, windows[1:2]).cases
    assert case.prompt_length + case.continuation_length == len(windows[1][0])
    assert case.passage == []  # no room for it


def test_the_judge_continues_after_an_image_that_follows_a_video():
    """Images come before videos in the list, whatever their order in the prompt."""
    config = tiny_qwen3_vl_config()
    model = pop.Model(random_model(config, seed=2), config, compile=False)
    image = prepared(model, 0)
    film = Prepared(
        "video", image.pixels, tuple([61 if p == 60 else p for p in ids] for ids in image.pieces), image.grid
    )
    window = tokens_of(2, film, *range(3, 21), image, 5)
    (case,) = Judge(model, [(window, [image, film])]).cases
    assert (window[case.prompt_length - 1], window[case.prompt_length :], case.continuation_length) == (60, [63, 5], 2)


def test_calibration_with_images(model, notes):
    """The plan runs, and on held-out texts with images it is not worse than plain pruning. Two steps distil it."""
    windows, rows = texts(model)
    made = notes(Judge, "__init__", lambda judge, model, windows: windows)
    plan = pop.PrunePlan((2, 3))
    result = pop.calibrate(model, windows, plan, images=rows, progress=False, seed=1, steps=2)
    (judged,) = made
    assert any(ones for _, ones in judged)
    judge = Judge(model, judged)
    plain = judge.losses(dataclasses.replace(plan, full_depth_first=1)).mean
    assert judge.losses(result).mean <= plain * (1 + 1e-4)
    answer = model.generate(windows[2], images=rows[2], plan=result, max_new_tokens=3)
    assert len(answer.tokens) == 3
    with pytest.raises(InputError, match="the text has runs"):
        pop.calibrate(model, windows, plan, progress=False, steps=0)
    shown = [number for number, row in enumerate(rows) if row]
    with pytest.raises(InputError, match="every text has images"):
        images = [rows[number] for number in shown]
        pop.calibrate(model, [windows[number] for number in shown], images=images, progress=False, speedup=1.1)


@pytest.mark.parametrize(
    ("layers", "first"),
    thinned([((0, 1, 2, 4), 1), ((1, 3), 4), ((4,), 1), ((0, 1, 2, 4), 4), ((1, 3), 1), ((4,), 4)], [0, 1]),
)
def test_the_loss_of_distillation_with_images_is_the_naive_one(model, layers, first):
    """And so are its gradients. The full-depth tokens may begin and end in an image."""
    a, b = prepared(model, 0), prepared(model, 2)
    rows = [tokens_of(2, a, 5, 6, b, *range(7, 15)), tokens_of(2, b, 9, 8, a, *range(20, 28))]
    media, cut = [[a, b], [b, a]], len(rows[0]) - 9
    images = [images_of(model, *pair) for pair in zip(rows, media, strict=True)]
    corrections = random_corrections(model.config, layers, seed=0, rank=7)
    selecting = 3 if 0 in layers else None
    plan = pop.PrunePlan(layers, 3, first, corrections, full_depth_selected=0.3, selecting_layer=selecting)
    rows = torch.tensor(rows)
    chosen = []
    for row, shown in zip(rows, images, strict=True):
        prompt_images = shown.at(torch.arange(cut)[None])
        selected = selected_tokens(model.module, row[:cut], plan, prompt_images)
        chosen.append(torch.zeros(cut, dtype=torch.bool) if selected is None else selected)
    expected, gradients = naive_gradients(model.module, plan, rows, torch.stack(chosen), cut, images)
    leaves = {name: x.clone().requires_grad_() for name, x in plan.corrections.tensors.items()}
    exercise = Exercise(rows, cut, media)
    trained = dataclasses.replace(plan, corrections=plan.corrections.replaced(leaves))
    loss = distillation_loss(model.module, model.vision, trained, exercise)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    for found, naive in zip(torch.autograd.grad(loss, [*leaves.values()]), gradients, strict=True):
        assert_close(found, naive)


def test_exercises_with_images(model):
    """A text with images is whole and alone. Passages of its text follow it, or what follows its last image."""
    a = prepared(model, 0)
    window = tokens_of(2, *range(3, 40), a, *range(40, 50))
    controls = {*tokens_of(a)} - {*model.vision.placeholders.values()}
    for number, seed in itertools.product(range(5), range(9)):
        tokens, cut, media = make_exercise(model, [(window, [a])], number, random.Random(seed))
        (row,) = tokens.tolist()
        assert media == [[a]]
        assert cut == model.vision.locate(window, [a])[0].stop
        if number in (0, 3):
            assert row == window
        else:
            assert row[:cut] == window[:cut] and len(row) == cut + CONTINUATION
            assert set(row[cut:]) <= {*range(2, 50), *controls}
