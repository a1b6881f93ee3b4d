"""Attention over a cache: what is written, what is read, and the band of keys that a block of queries attends."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from support.cases import NONE, new_cache, prefill
from support.tiny import random_model, tiny_gemma3_config

from pop import engine
from pop.engine import attention
from pop.engine.chunks import Chunk, Prompts, chunk_bounds
from pop.models.images import TEXT
from pop.models.layers import masked_attention


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_are_written_to_their_slots_and_read_from_them():
    keys, values = torch.zeros(2, 5, 1, 3), torch.zeros(2, 5, 1, 3)  # four slots and the spare one
    k, v = randn(2, 2, 1, 3), randn(2, 2, 1, 3, seed=1)
    slots = torch.tensor([[3, 0], [1, 4]])
    attention.write(keys, values, slots, k, v)
    for stored, written in ((keys, k), (values, v)):
        expected = torch.zeros(2, 5, 1, 3)
        expected[0, 3], expected[0, 0], expected[1, 1], expected[1, 4] = *written[0], *written[1]
        assert torch.equal(stored, expected)

    q, mask = randn(2, 1, 2, 3, seed=2), torch.ones(2, 1, 2, dtype=torch.bool)
    held, spans = torch.arange(2).repeat(2, 1), torch.tensor([[[0, 1]]]).repeat(2, 1, 1)
    band = torch.tensor((0, attention.UNBOUNDED, attention.UNBOUNDED, 0))
    for key_slots, read in ((slots, (k, v)), (None, (keys[:, :2], values[:, :2]))):
        at = attention.AttentionMetadata((), slots, spans, held, key_slots, band)
        assert torch.equal(attention.cache_attention(q, keys, values, at, 0.3), masked_attention(q, *read, mask, 0.3))
    assert not torch.equal(k, keys[:, :2])


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


@given(st.data())
def test_a_full_band_is_aligned_at_the_lower_right(data):
    """A band that is all that the spans say can be attended without a mask, by its window alone."""
    windows = (data.draw(st.sampled_from([2, 3, 7]), "window"), None)
    module, B = random_model(tiny_gemma3_config(windows=windows)), data.draw(st.integers(1, 3), "rows")
    chunk_size, held = data.draw(st.sampled_from([2, 4, 7, 64]), "chunk"), data.draw(st.integers(0, 30), "held")
    cache = new_cache(module, B, slots=70, chunk=chunk_size)
    cache.lengths[:] = held
    if data.draw(st.booleans(), "rows differ"):
        cache.lengths[0] = data.draw(st.integers(0, 30))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 35), min_size=B, max_size=B), "lengths"))
    ids = torch.zeros(B, int(lengths.max()), dtype=torch.int64)
    prompts = Prompts(ids, lengths, TEXT, ids > 0)
    for begin, end in chunk_bounds(prompts, chunk_size):
        chunk = Chunk.of(module, cache, prompts, (begin, end))
        valid = chunk.index < ids.shape[1]
        with_tokens = end > begin
        same = len(set((cache.lengths + begin)[with_tokens].tolist())) == 1
        for window, at in chunk.attention.items():
            if at.band is None or chunk.ids.shape[1] == 1:
                continue
            own, _, after, is_full = at.band.tolist()
            assert (bool(is_full), after) == (same, 0)
            if not is_full:
                continue
            T = chunk.ids.shape[1]
            distance = torch.arange(own + T) - own - torch.arange(T)[:, None]  # [T, keys]
            band = (distance <= 0) & (distance > -(window or 10**9))
            mask = attention.span_mask(at.held, at.spans)
            assert not (mask[..., own + T :].any(-1) & valid).any()
            assert ((mask[..., : own + T] == band) | ~valid[..., None]).all()


@pytest.mark.usefixtures("small_query_blocks")
@pytest.mark.parametrize("held", [0, 30])
def test_a_windows_prefill_attends_a_band(monkeypatch, held):
    """A block of three tokens attends the keys of its windows only, in a fresh chunk and after 30 tokens in a ring."""
    module = random_model(tiny_gemma3_config(windows=(5, None)), seed=4)
    cache = new_cache(module, 1, chunk=24)
    if held:
        prefill(module, torch.arange(held)[None], torch.tensor([held]), NONE, 24, cache)
    attend, sizes = attention.masked_attention, []

    def watched(q, k, v, mask, scale):
        sizes.append((q.shape[1], k.shape[1]))
        return attend(q, k, v, mask, scale)

    monkeypatch.setattr(attention, "masked_attention", watched)
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
