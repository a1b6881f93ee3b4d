"""Attention over a cache: what is written, what is read, and the band of keys that a block of queries attends."""

import pytest
import torch
from support.cases import NONE, new_cache, prefill
from support.tiny import random_model, tiny_gemma3_config

from pop import engine
from pop.engine import attention
from pop.engine.chunks import Chunk, Prompts
from pop.models.images import TEXT


def test_the_example_in_the_docstring_of_attention_metadata():
    """A ring of six slots, a window of three, and a row that writes positions 6 and 7."""
    module = random_model(tiny_gemma3_config(windows=(3,)))
    cache = new_cache(module, 1, chunk=4)
    assert cache.slots(3) == 6
    cache.lengths[:] = 6
    lengths = torch.tensor([2])
    prompts = Prompts(torch.tensor([[7, 8]]), lengths, TEXT, torch.tensor([[False, False]]))
    at = Chunk.of(module, cache, prompts, (torch.tensor([0]), lengths)).attention[3]
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
