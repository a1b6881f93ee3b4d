"""Which tokens make a chunk, which of them run at full depth, and which keys they read and attend to."""

import pytest
import torch
from support.cases import NONE, new_cache, prefill
from support.tiny import random_model, tiny_config, tiny_gemma3_config
from support.tiny_images import both_ways

from pop import engine
from pop.engine import attention
from pop.engine.chunks import Chunk, FullDepth, Prompts, chunk_bounds, full_depth_by_position
from pop.models.images import TEXT
from pop.pruning.plan import PrunePlan


def prompts_of(cache, lengths, plan=NONE, images=TEXT):
    """Prompts of zeros."""
    lengths = torch.tensor(lengths)
    tokens = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    return Prompts(tokens, lengths, images, full_depth_by_position(cache, lengths, plan, True))


def chunks_of(module, cache, prompts, size=1000):
    return [Chunk.of(module, cache, prompts, bounds) for bounds in chunk_bounds(prompts, size)]


@pytest.mark.parametrize(
    ("held", "image", "is_exact"),
    [([5, 5], False, True), ([3, 5], False, False), ([0, 0], True, False)],
    ids=["text", "rows that begin apart", "an image with look-ahead"],
)
def test_only_a_band_that_is_exact_needs_no_mask(held, image, is_exact):
    module = random_model(tiny_gemma3_config(windows=(None,)))
    cache = new_cache(module, 2)
    cache.lengths[:] = torch.tensor(held)
    numbers = torch.tensor([[-1, 0, 1, 2, 3, -1]] * 2 if image else [[-1] * 6] * 2)
    prompts = prompts_of(cache, [6, 6], images=both_ways(torch.zeros(1, 4, 30), numbers))
    (chunk,) = chunks_of(module, cache, prompts)
    assert bool(chunk.attention[None].band[-1]) == is_exact


def test_padding_attends_to_tokens_of_its_row():
    """Even far behind a short row with a window, so that no softmax is empty."""
    module = random_model(tiny_gemma3_config(windows=(3, None)))
    cache = new_cache(module, 2)
    lengths = [9, 2]
    (chunk,) = chunks_of(module, cache, prompts_of(cache, lengths))
    for at in chunk.attention.values():
        first, last = at.spans.unbind(-1)  # [B, C] each
        assert (first >= 0).all()
        assert (first <= last).all()
        assert (last < torch.tensor(lengths)[:, None]).all()


def test_a_prompt_that_goes_on_is_not_short():
    cache = new_cache(random_model(tiny_config()), 3)
    cache.lengths[:] = torch.tensor([0, 0, 6])
    plan = PrunePlan((2,), full_depth_below=9)
    for is_last_part, expected in (
        (False, [[0, 0, 0], [0, 1, 1], [0, 0, 0]]),
        (True, [[1, 1, 1], [1, 1, 1], [0, 0, 1]]),
    ):
        found = full_depth_by_position(cache, torch.tensor([3, 1, 3]), plan, is_last_part)
        assert found.int().tolist() == expected


def test_full_depth_tokens_by_hand():
    """Two rows of 7 and 4 tokens in chunks of 5, one first and two last tokens of each at full depth."""
    module, plan = random_model(tiny_config()), PrunePlan((2,), full_depth_last=2, full_depth_first=1)
    cache = new_cache(module, 2)
    prompts = prompts_of(cache, [7, 4], plan)
    first, second = chunks_of(module, cache, prompts, 5)
    full = FullDepth.of(cache, first, prompts, plan)
    columns = [row[valid].tolist() for row, valid in zip(full.columns, full.valid, strict=True)]
    assert columns == [[0], [0, 2, 3]]
    spare = cache.slots(None)  # takes the columns that are not valid
    assert full.attention[None].slots.tolist() == [[spare, spare, 0], [0, 2, 3]]
    # Nothing is left to prune in the second chunk, so its tokens run as in a kept layer.
    full = FullDepth.of(cache, second, prompts, plan)
    assert full.plan == NONE and full.columns.shape == (2, 0)
    assert second.attention[None].band[-1]  # a row that has ended does not make it inexact


def test_one_full_depth_token_a_row_attends_by_slots():
    """So compiled models need no other graph for it, and GPUs no other kernel."""
    module, plan = random_model(tiny_config()), PrunePlan((2,))
    cache = new_cache(module, 2)
    prompts = prompts_of(cache, [7, 4], plan)
    (chunk,) = chunks_of(module, cache, prompts)
    assert FullDepth.of(cache, chunk, prompts, plan).attention[None].held is None


def test_the_example_in_the_docstring_of_the_record_of_attention():
    """A ring of six slots, a window of three, and a row that writes positions 6 and 7."""
    module = random_model(tiny_gemma3_config(windows=(3,)))
    cache = new_cache(module, 1, chunk=4)
    assert cache.slots(3) == 6
    cache.lengths[:] = 6
    (chunk,) = chunks_of(module, cache, prompts_of(cache, [2]))
    at = chunk.attention[3]
    assert at.slots.tolist() == [[0, 1]]
    assert at.key_slots.tolist() == [[4, 5, 0, 1]]
    assert at.held.tolist() == [[4, 5, 6, 7]]
    assert at.spans.tolist() == [[[4, 6], [5, 7]]]
    assert attention.span_mask(at.held, at.spans).int().tolist() == [[[1, 1, 1, 0], [0, 1, 1, 1]]]
    assert at.band.tolist() == [2, 2, 0, 1]


@pytest.mark.usefixtures("small_query_blocks")
@pytest.mark.parametrize("held", [0, 30])
def test_a_windows_prefill_attends_a_band(notes, held):
    """A block of three tokens attends the keys of its windows only, in a fresh chunk and after 30 tokens in a ring."""
    module = random_model(tiny_gemma3_config(windows=(5, None)), seed=4)
    cache = new_cache(module, 1, chunk=24)
    if held:
        prefill(module, torch.arange(held)[None], torch.tensor([held]), NONE, 24, cache)
    sizes = notes(attention, "masked_attention", lambda q, k, *_: (q.shape[1], k.shape[1]))
    prefill(module, torch.arange(24)[None], torch.tensor([24]), NONE, 24, cache)
    local = [(3, 3), (3, 6)] if not held else [(3, 7), (3, 7)]
    local += [(3, 7)] * 6
    assert sizes == local + ([(3, held + n) for n in range(3, 27, 3)] if held else [])


def test_a_row_stepped_far_beyond_its_cache_attends_something(monkeypatch):
    """Its logits mean nothing, but a caller may sample from them. So they must not come from an empty softmax."""
    attend = attention.masked_attention

    def checked(q, k, v, mask, scale):
        assert q.shape[1] > 1 or mask.any(-1).all()
        return attend(q, k, v, mask, scale)

    monkeypatch.setattr(attention, "masked_attention", checked)
    module = random_model(tiny_gemma3_config(windows=(2, None, 2)), seed=3)
    cache = new_cache(module, 2, slots=8)
    prefill(module, torch.arange(8)[None].repeat(2, 1), torch.tensor([8, 1]), NONE, cache=cache)
    for _ in range(7):
        assert engine.decode(module, torch.tensor([1, 1]), cache).isfinite().all()
