"""Prefill and decode of prompts with images compute what pop/pruning/reference.py computes.

Images have random features at any tokens. So the engine is held to what `Images` says, and not to the
rules of one family's processor.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.cases import (
    NONE,
    assert_close,
    cached_kv,
    experts,
    in_windows,
    new_cache,
    plans,
    qwen3_vl_config,
    randn,
    recorded_choices,
    stack_layers,
    with_chosen,
)
from support.replay import Replay
from support.tiny import random_model, tiny_gemma3_config, tiny_qwen3_vl_config
from support.tiny_images import both_ways

from pop import engine
from pop.backends import accelerate
from pop.models.images import Images
from pop.models.qwen3_vl import image_positions
from pop.models.vision.qwen3_vl import Grid
from pop.pruning import reference
from pop.pruning.plan import PrunePlan

pytestmark = pytest.mark.usefixtures("small_query_blocks")


@st.composite
def prompts_with_images(draw, vocab_size, sizes, max_rows=3):
    """A ragged batch with images anywhere: tokens [B, T], lengths [B], and which image token each is [B, T], or -1.

    sizes: how many tokens an image has.
    """
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        row = [-1] * draw(st.integers(0, 6))
        for _ in range(draw(st.integers(0, 3))):
            row += [0] * draw(sizes) + [-1] * draw(st.integers(1, 6))
        rows.append(row + ([0] * draw(sizes) if draw(st.booleans()) else [-1]))
    lengths = torch.tensor([len(row) for row in rows])
    is_image = torch.tensor([row + [-1] * (int(lengths.max()) + 1 - len(row)) for row in rows]) == 0
    assume(is_image.any())
    numbers = (is_image.flatten().cumsum(0) - 1).view_as(is_image).where(is_image, -1)
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randint(vocab_size, is_image.shape, generator=random), lengths, numbers


@st.composite
def image_cases(draw):
    """(module, plan, tokens, lengths, chunk size, images), for each family that reads images.

    Chunks of Gemma-3 hold at least one image. Those of Qwen3-VL may cut images. Its rotary positions are random, so the
    engine must use the positions that it is given.
    """
    if draw(st.booleans()):
        side = draw(st.sampled_from([1, 2, 3]))
        windows = st.sampled_from([draw(st.sampled_from([1, 2, 5, 9, 100])), None])
        config = tiny_gemma3_config(windows=tuple(draw(st.lists(windows, min_size=1, max_size=5))))
        tokens, lengths, numbers = draw(prompts_with_images(config.vocab_size, st.just(side * side)))
        chunk = side * side + draw(st.sampled_from([0, 1, 4, 1000]))
    else:
        num_layers = draw(st.integers(1, 5))
        config = qwen3_vl_config(draw, num_layers=num_layers, experts=draw(experts()))
        tokens, lengths, numbers = draw(prompts_with_images(config.vocab_size, st.integers(1, 7)))
        chunk = draw(st.sampled_from([1, 2, 5, 11, 1000]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    features = torch.randn(
        1 + len(getattr(config.vision, "deepstack", ())), int(numbers.max()) + 1, 30, generator=random
    )
    if config.family == "gemma3":
        images = both_ways(features[0].view(-1, side * side, 30), numbers)
    else:
        is_token = torch.arange(tokens.shape[1]) < lengths[:, None]
        positions = torch.randint(40, (3, *tokens.shape), generator=random) * is_token
        images = Images(features[0], numbers, rope_positions=positions, deepstack=tuple(features[1:]))
    return random_model(config, seed=draw(st.integers(0, 9))), draw(plans(config)), tokens, lengths, chunk, images


def of_row(images, row, length, before):
    """The images of one row's prompt, after `before` tokens of text."""
    numbers, ahead, positions = images.feature_index[row : row + 1, :length], None, None
    if images.look_ahead is not None:
        ahead = F.pad(images.look_ahead[row : row + 1, :length], (before, 0))
    if images.rope_positions is not None:
        text = torch.arange(before).expand(3, 1, -1)
        positions = torch.cat((text, before + images.rope_positions[:, row : row + 1, :length]), dim=2)
    return dataclasses.replace(
        images, feature_index=F.pad(numbers, (before, 0), value=-1), look_ahead=ahead, rope_positions=positions
    )


@settings(max_examples=3 * settings().max_examples)
@given(
    image_cases(),
    st.integers(0, 7),
    st.integers(0, 3),
    st.sampled_from([engine.EAGER, engine.Stages(replay=Replay)]),
    st.booleans(),
)
def test_images_are_the_references(case, before, steps, stages, accelerated):
    """Prefill, cache and decode, for any plan, window, batch and chunking, alone or after a text.

    Also with decode steps on fixed memory, and with the CPU's attention by products.
    """
    module, plan, tokens, lengths, chunk, images = case
    if accelerated:
        module = copy.deepcopy(module)
        accelerate(module)
    B = len(tokens)
    random = torch.Generator().manual_seed(1)
    text = torch.randint(module.config.vocab_size, (B, before + B), generator=random)
    answer = torch.randint(module.config.vocab_size, (B, steps), generator=random)
    cache = new_cache(module, B, slots=128, chunk=chunk)
    if before:
        engine.prefill(module, text, cache, torch.arange(before, before + B), NONE, chunk)
    held_before = cache.lengths.tolist()
    with recorded_choices() as choices:
        logits = [engine.prefill(module, tokens, cache, lengths, plan, chunk, stages, images)]
    logits = torch.stack(logits + [engine.decode(module, token, cache, stages) for token in answer.T], dim=1)
    # Earlier tokens are at full depth, so only those of the prompts can be selected.
    chosen = choices[0][:, -int(lengths.max()) :] if choices else torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (n, m) in enumerate(zip(held_before, lengths.tolist(), strict=True)):
        whole = torch.cat((text[row, :n], tokens[row, :m], answer[row]))
        full_depth = reference.full_depth_tokens(n + m, len(whole), plan) | (torch.arange(len(whole)) < n)
        selected = F.pad(chosen[row, :m], (n, steps))
        expected, kv = with_chosen(module, whole, full_depth, plan, selected, of_row(images, row, m, n))
        assert_close(logits[row], expected[n + m - 1 :])
        assert_close(cached_kv(module, cache, row), in_windows(module, stack_layers(kv)))


def test_a_first_full_depth_token_sees_the_rest_of_its_image():
    """At the prompt's end the window has left the image. So only the first tokens need the K and V of its rest."""
    module = random_model(tiny_gemma3_config(), seed=6)
    tokens, lengths = torch.arange(30)[None], torch.tensor([30])
    numbers = torch.full((1, 30), -1)
    numbers[0, 1:5] = torch.arange(4)
    images = both_ways(randn(1, 4, 30, seed=1), numbers)
    plan = PrunePlan(layers=(1,), full_depth_first=2)
    logits = engine.prefill(module, tokens, new_cache(module, 1), lengths, plan, 1000, images=images)
    assert_close(logits[0], reference.prefill(module, tokens[0], plan, images))


def test_tokens_after_an_image_are_not_kept_to_be_selected_again():
    """In Qwen3-VL, their rotary positions do not count tokens."""
    module = random_model(tiny_qwen3_vl_config(), seed=3)
    last = len(module.layers) - 1
    plan = PrunePlan((last,), full_depth_selected=0.3, selecting_layer=last - 1)
    numbers = torch.full((1, 16), -1)
    numbers[0, 4:12] = torch.arange(8)
    positions = image_positions(16, [(range(4, 12), Grid(1, 4, 8))], merge_size=2)[:, None]
    images = Images(randn(8, 30, seed=1), numbers, rope_positions=positions)
    cache = new_cache(module, 1)
    engine.prefill(module, torch.arange(16)[None], cache, torch.tensor([16]), plan, 5, images=images)
    engine.prefill(module, torch.arange(16, 24)[None], cache, torch.tensor([8]), plan, 5)
    is_kept = cache.skipped[0] >= 0
    assert is_kept[:5].all() and not is_kept[5:].any()  # the image's first token is where it would be as text
