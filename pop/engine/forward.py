"""Pruned prefill and full-depth decode on a static KV cache.

    h, all prompt tokens     ──layer 0──layer 1── ... ──┬── K, V only of every pruned layer ──► cache
                                                        │
    full-depth rows, f                                  └──layer l──layer l+1── ... ──► logits

Read literally, the method runs the prompt without the pruned layers and then the boundary token as a decode step of
its own, so all weights are read twice. Here both happen in one pass (`fused boundary`): below the first pruned layer
the boundary token does what every token does. In a run of pruned layers, all tokens leave their K and V, computed
from the h that entered the run; then only the full-depth rows f go through the run's layers, overwriting their own
K and V in the cache and attending what is there.

A calibrated plan (pop/pruning/projections.py) puts refit projections in place of the layers' own where K and V of a run are
written; the full-depth rows keep to the layers' own.

All products of matrices and all attention are in four functions, the `Stages`. They see one layer at a time, its
weights and its slots of the cache as arguments, so that each is compiled once for all layers (pop/engine/compile.py), and
every length of a prompt, of the cache and of a batch is a dimension, never a Python number. What is around them is
bookkeeping: laid out on the CPU, without waiting for the device.

A layer with a window (Gemma's local ones) holds K and V of the tokens that can still be seen, in slots used in turn
(pop/engine/cache.py). Which slots tokens write to and attend, and their rotary tables, depend on the window alone; `Seen` has
them. A pruned layer with a window does nothing for tokens that nobody will attend.

What images and videos bring along is data (Images, in models/layers.py), and text has none of it: features in place of
embeddings; features added to h behind the first layers, also where these are pruned, so that each of them is a run of
its own; rotary positions other than the tokens' places in the sequence, which the tokens behind go on from; and tokens
that attend the rest of their image, ahead of them. Such an image is never cut: a chunk ends before one that it cannot
hold, in each row of a batch for itself. All else is causal.

The only state is the cache, and it counts tokens as held only once their logits are there. Nothing is checked here:
`pop.Model` does that. Shape letters: see models/layers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from pop.engine.cache import KVCache, read, write
from pop.models.layers import Images, Rope, attention_by_blocks, causal_attention, linear, masked_attention
from pop.pruning.plan import PrunePlan

# The stages


def full_layer(layer, h, rope, slots, keys, values, mask, attended, span):
    """A layer at full depth: h [B, T, D] -> [B, T, D]; its K and V go to `slots` before anything is attended.

    keys, values: [B, S + 1, K, E], the layer's part of the cache. mask, attended, span: see Seen.
    """
    q, k, v = layer.queries_keys_values(h, rope)
    write(keys, values, slots, k, v)
    # Read back even what is fresh: where the batch has padding, the cache has not, and nothing can come out of it.
    # In k's shape: compiled code knows its heads from the weights, as numbers, and the cache's only as symbols.
    found = read(keys, values, (h.shape[1] if mask is None else mask.shape[-1]) if attended is None else attended)
    k, v = (x.view(-1, x.shape[1], *k.shape[2:]) for x in found)
    if mask is None:
        out = causal_attention(q, k, v, layer.scale, None)
    elif h.shape[1] == 1:
        out = masked_attention(q, k, v, mask, layer.scale)
    else:
        out = attention_by_blocks(q, k, v, mask, span, layer.scale)
    return layer.update(h, out)


def pruned_layer(layer, h, rope, slots, keys, values):
    """A pruned layer: its K and V, from the h [B, T, D] that entered the run of pruned layers, and nothing else."""
    write(keys, values, slots, *layer.keys_values(h, rope))


def refit_layer(layer, inputs, weight, bias, rope, slots, keys, values):
    """A pruned layer of a calibrated plan: K and V of inputs [B, T, taps * D] by weight [2, K * E, taps * D].

    bias: [2, K * E]. One product for both; the inputs are the same for all layers of a run.
    """
    k, v = linear(inputs, weight.flatten(0, 1), bias.flatten()).chunk(2, dim=-1)  # [B, T, K * E] each
    write(keys, values, slots, *layer.placed(k, v, rope))


def head(module, h):
    """h [..., D] behind the last layer -> logits [..., V]."""
    return module.head(h)


def vision_layer(layer, h, *rope):
    """A layer of a vision tower: h [N, P, C] -> [N, P, C]; rope: the tables of its patches, if it turns by any."""
    return layer(h, *rope)


class Stages(NamedTuple):
    """The functions as they are called: these, or compiled ones. The last one is pop/inputs/processors.py's, not the engine's."""

    full_layer: Callable = full_layer
    pruned_layer: Callable = pruned_layer
    refit_layer: Callable = refit_layer
    head: Callable = head
    vision_layer: Callable = vision_layer


EAGER = Stages()
FAR = 2**31  # tokens: more than any sequence has

# Prefill and decode


@torch.no_grad()
def prefill(
    module,
    tokens: torch.Tensor,
    cache: KVCache,
    lengths: torch.Tensor,
    plan: PrunePlan,
    chunk_size: int,
    stages: Stages = EAGER,
    images: Images | None = None,
    boundary: bool = True,
) -> torch.Tensor:
    """Append prompts to the cache and predict what follows each.

    tokens: [B, T] right-padded, lengths: [B] on the CPU, 1 <= lengths <= T. Chunks of `chunk_size` tokens, or as many
    as the cache takes at once, run one after the other, which bounds the memory for activations. A plan's projections
    are on the module's device in its dtype, and so are the features of images; a chunk must be able to hold an image
    whose tokens attend ahead. Returns logits [B, V] of each row's boundary token. Without a boundary, no token is among
    a prompt's last ones, since more of it will follow; then the logits mean nothing.
    """
    out = None  # [B, D], each row's h behind the last layer, at its last token so far
    states = cache.states
    for begin, end in _chunks(lengths, min(chunk_size, cache.chunk_size), images):
        at = Layout.of_chunk(cache, lengths, plan, begin, end, tokens.device, images, boundary)
        h, states = _chunk(module, tokens, cache, states, at, stages)
        out = at.latest(h, out)
    logits = stages.head(module, out)
    shifts = cache.shifts if images is None else cache.shifts + images.shift(lengths)
    cache.point = cache.lengths + lengths, states, shifts
    return logits


@torch.no_grad()
def extend(module, tokens: torch.Tensor, cache: KVCache, stages: Stages = EAGER) -> torch.Tensor:
    """Append tokens [B, T] at full depth, as decode would one by one. Returns logits [B, T, V] at every position."""
    B, T = tokens.shape
    lengths, states, logits = torch.full((B,), T), cache.states, []
    for begin, end in _chunks(lengths, cache.chunk_size):
        at = Layout.of_chunk(cache, lengths, PrunePlan.none(), begin, end, tokens.device)
        h, states = _chunk(module, tokens, cache, states, at, stages)
        logits.append(stages.head(module, h))
    cache.point = cache.lengths + lengths, states, cache.shifts
    return torch.cat(logits, dim=1)


@torch.no_grad()
def decode(module, tokens: torch.Tensor, cache: KVCache, stages: Stages = EAGER) -> torch.Tensor:
    """Append one token a row at full depth: tokens [B] -> logits [B, V] of what follows.

    A row that is full already may be stepped with the others: its token goes to the spare slot and its logits mean
    nothing.
    """
    ends = (cache.lengths + 1).clamp(max=cache.max_seq_len)  # [B]
    positions, rotary = (x[:, None].to(tokens.device) for x in (cache.lengths, cache.lengths + cache.shifts))  # [B, 1]
    seen = Seen.by_window(module, cache, positions, rotary, positions < cache.max_seq_len, ends)
    h = module.embed(tokens[:, None])  # [B, 1, D]
    states = []
    for index, layer in enumerate(module.layers):
        states.append(h[:, 0])
        h = stages.full_layer(layer, h, *seen[layer.window].arguments(*cache.layer(index)))
    logits = stages.head(module, h)[:, 0]  # [B, V]
    cache.point = cache.lengths + 1, torch.stack(states), cache.shifts
    return logits


@dataclasses.dataclass(frozen=True)
class Seen:
    """Tokens [B, T] as all layers with one window see them.

    rope: their rotary tables. slots: [B, T], where their K and V go.
    mask: [B, T, keys], which keys they attend, or None for a fresh chunk of text that the window does not cut: it
        attends itself, causally.
    attended: [B, keys], the slots of these keys; None: the first ones.
    span: which of the keys a token can attend at all, by its place in the chunk: see attention_by_blocks.
    """

    rope: Rope
    slots: torch.Tensor
    mask: torch.Tensor | None
    attended: torch.Tensor | None = None
    span: torch.Tensor | None = None

    @classmethod
    def by_window(
        cls, module, cache: KVCache, positions, rotary, valid, ends, fresh: bool = False, reach=None, chunk=None
    ) -> dict[int | None, Seen]:
        """One for each window that layers have.

        positions: [B, T] in the sequence. rotary: [B, T], or [3, B, T] by axis, what module.rope makes tables of.
        valid: [B, T], false for tokens that are kept nowhere. ends: [B] on the CPU, the tokens that each row has when
        these are written. fresh: they are all that there is. reach: [B, T], the last position that each may attend;
        None: its own. chunk: of several tokens side by side, the largest position that a row begins with and the most
        that a token reaches beyond its own; None: they are anywhere.
        """
        ropes, filled = module.rope(rotary), max(2, int(ends.max()))  # torch compiles a size of 1 by itself: 2
        ends = ends.to(positions.device)[:, None]  # [B, 1]
        last = torch.minimum(positions, ends - 1)  # of tokens beyond the end, too, no softmax is empty
        reach = last if reach is None else torch.minimum(reach, ends - 1)
        seen = {}
        for window, rope in ropes.items():
            ring = cache.slots(window)
            slots = (positions % ring).where(valid, ring)
            mask = attended = span = None
            if not fresh or (window is not None and filled > window):
                own, before, behind = 0, FAR, FAR
                if chunk is not None:
                    own, before, behind = chunk[0], FAR if window is None else window - 1, chunk[1]
                if chunk is None or fresh or window is None:
                    slot = torch.arange(min(filled, ring), device=positions.device)
                    held = ends - 1 - (ends - 1 - slot) % ring  # [B, keys], the latest position written to each slot
                else:  # in the sequence's order, which that of the slots is not
                    own = min(own, before)
                    held = positions[:, :1] - own + torch.arange(own + positions.shape[1], device=positions.device)
                    attended = held % ring  # [B, keys]
                mask = (held >= 0)[:, None] & (held[:, None] <= reach[..., None])
                if window is not None:
                    mask &= held[:, None] > last[..., None] - window
                span = torch.tensor([own, before, behind])
            seen[window] = cls(rope, slots, mask, attended, span)
        return seen

    def arguments(self, keys: torch.Tensor, values: torch.Tensor) -> tuple:
        """What full_layer takes behind h."""
        return self.rope, self.slots, keys, values, self.mask, self.attended, self.span


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which token of a chunk is where. Laid out on the CPU, without waiting for the device, then moved there.

    index: [B, C], of each token in its prompt. positions: [B, C], in its sequence. rotary: [B, C] or [3, B, C], what it
        is rotated by. valid: [B, C], false for padding.
    images: what of the images is in the chunk, or None if it is all text. reach: [B, C], see Images, or None.
    ends: [B] on the CPU, the tokens of each row behind the chunk. span: the largest position that a row's part of it
        begins with, and the most that a token reaches beyond its own; None for one token, laid out as in decode.
    fresh: the cache was empty, so the chunk attends itself alone, and causally; false for one token.
    seen_from: where in the chunk the prompt's last full-depth tokens begin, in the row where that is earliest; beyond
        C or negative if it is in another chunk. With a window they see the window - 1 tokens before that, and nobody
        sees earlier ones. 0 if the first full-depth tokens are in an image that goes on behind them, which they see.
    rows: [B, W], which tokens are the full-depth rows f: W distinct ones, others as filling where a row has fewer.
    rows_valid: [B, W], false for the filling. rows_positions, rows_rotary, rows_reach: as above.
    last: [B], each row's last token in the chunk. last_row: [B], that token among the rows f, -1 if it is not.
    holds_last: [B], false for a row that ended in an earlier chunk.
    """

    plan: PrunePlan
    images: Images | None
    index: torch.Tensor
    positions: torch.Tensor
    rotary: torch.Tensor
    reach: torch.Tensor | None
    valid: torch.Tensor
    ends: torch.Tensor
    span: tuple[int, int] | None
    fresh: bool
    seen_from: int
    rows: torch.Tensor
    rows_valid: torch.Tensor
    rows_positions: torch.Tensor
    rows_rotary: torch.Tensor
    rows_reach: torch.Tensor | None
    last: torch.Tensor
    last_row: torch.Tensor
    holds_last: torch.Tensor

    @classmethod
    def of_chunk(
        cls, cache: KVCache, lengths, plan: PrunePlan, begin, end, device, images: Images | None = None, boundary=True
    ) -> Layout:
        """The layout of tokens `begin` to `end` [B] of prompts of `lengths` [B], to be appended to what the cache has.

        A row without any is all padding.
        """
        full_depth_last = plan.full_depth_last if boundary else 0
        C = int((end - begin).max())
        start, lengths, begin, end = (x[:, None] for x in (cache.lengths, lengths, begin, end))  # [B, 1]
        index = begin + torch.arange(C)  # [B, C] within the prompt
        positions = start + index  # [B, C] within the sequence
        valid = index < end
        rotary = (start + cache.shifts[:, None]) + (index if images is None else images.rotary(index))
        images = None if images is None else images.of(index, valid)
        reach = None if images is None else images.reach(positions)
        full_depth = (positions < plan.full_depth_first) | (index >= lengths - full_depth_last)
        if (full_depth | ~valid).all():
            plan = PrunePlan.none()  # nothing is left to prune
        full_depth &= valid

        count = full_depth.sum(1)  # [B]
        W = int(count.max()) if plan.layers else 0
        rows = (~full_depth).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]  # the full-depth tokens first
        last = (end - begin)[:, 0] - 1  # negative: the row ended before
        holds_last = last >= 0
        last = last.clamp(min=0)
        last_full = full_depth.gather(1, last[:, None])[:, 0] & bool(W)
        ahead = 0 if reach is None else int((reach - positions).max())
        span = (int(positions[:, 0].max()), ahead) if C > 1 else None
        seen_from = int((lengths - begin)[end > begin].min()) - full_depth_last
        if reach is not None and (valid & (positions < plan.full_depth_first) & (reach >= plan.full_depth_first)).any():
            seen_from = 0
        tensors = {
            "index": index.minimum(lengths - 1),
            "positions": positions,
            "rotary": rotary,
            "reach": reach,
            "valid": valid,
            "rows": rows,
            "rows_valid": full_depth.gather(1, rows),
            "rows_positions": positions.gather(1, rows),
            "rows_rotary": rotary.gather(-1, rows.expand(*rotary.shape[:-1], -1)),
            "rows_reach": None if reach is None else reach.gather(1, rows),
            "last": last,
            "last_row": (count - 1).where(last_full, -1),
            "holds_last": holds_last,
        }
        return cls(
            plan=plan,
            images=images,
            ends=(start + end)[:, 0],
            span=span,
            fresh=C > 1 and reach is None and not positions[:, 0].any(),
            seen_from=seen_from,
            **{name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()},
        )

    def latest(self, h: torch.Tensor, before: torch.Tensor | None, f: torch.Tensor | None = None) -> torch.Tensor:
        """Each row's h [B, C, D] at its last token; `before` [B, D] of a row that has none in this chunk.

        f: [B, W, D], if given: what the full-depth rows have in place of their h.
        """
        batch = torch.arange(len(self.last), device=h.device)
        out = h[batch, self.last]  # [B, D]
        if f is not None:
            out = torch.where((self.last_row >= 0)[:, None], f[batch, self.last_row], out)
        return out if before is None else torch.where(self.holds_last[:, None], out, before)


def _chunks(lengths: torch.Tensor, chunk_size: int, images: Images | None = None):
    """Where chunks of prompts of `lengths` [B] begin and end, each [B], so that no token attends ahead of its chunk.

    As long as chunk_size and the images let them be; equal for a row that has ended.
    """
    begin = torch.zeros_like(lengths)
    while (begin < lengths).any():
        end = lengths.minimum(begin + chunk_size)
        if images is not None:
            end = images.whole(begin, end)
        yield begin, end
        begin = end


def _chunk(module, tokens, cache, states, at: Layout, stages: Stages):
    """One chunk of tokens [B, T] through all layers -> h [B, C, D], final where at full depth, and the new states.

    states: [L, B, D], see KVCache.
    """
    h = module.embed(tokens.gather(1, at.index))  # [B, C, D]
    if at.images is not None:
        h = at.images.place(h)
    seen = Seen.by_window(module, cache, at.positions, at.rotary, at.valid, at.ends, at.fresh, at.reach, at.span)
    W = at.rows.shape[1]
    if W:
        places = at.rows_positions, at.rows_rotary, at.rows_valid
        rows_seen = Seen.by_window(module, cache, *places, at.ends, reach=at.rows_reach)
    new_states = []
    for pruned, run in at.plan.runs(len(module.layers), module.deepstack_layers):
        if pruned:
            _pruned_run(module, run, h, states[run[0]], cache, at, seen, stages)
            rows = at.rows[..., None].expand(-1, -1, h.shape[2])  # [B, W, D]
            f = before = h.gather(1, rows)
            for index in run:
                new_states.append(at.latest(h, states[index], f if W else None))
                if W:
                    layer = module.layers[index]
                    f = stages.full_layer(layer, f, *rows_seen[layer.window].arguments(*cache.layer(index)))
            h = h.scatter(1, rows, f.where(at.rows_valid[..., None], before))
        else:
            for index in run:
                new_states.append(at.latest(h, states[index]))
                layer = module.layers[index]
                h = stages.full_layer(layer, h, *seen[layer.window].arguments(*cache.layer(index)))
        if at.images is not None:
            h = at.images.deepen(h, run[-1])
    return h, torch.stack(new_states)


def _pruned_run(module, run, h, state, cache, at: Layout, seen, stages: Stages):
    """Write K and V of a run of pruned layers, all from the h [B, C, D] that enters it.

    state: [B, D], the h that entered the run at the token before the chunk.
    """
    refit = at.plan.projections
    if refit is not None:
        normalise = module.layers[run[0]].input_layernorm.normalise
        h = refit.inputs(normalise(h), normalise(state))  # [B, C, taps * D]
    tails = {}  # what there is to do, by window
    for number, index in enumerate(run, start=at.plan.layers.index(run[0])):
        layer = module.layers[index]
        if layer.window not in tails:
            first = 0 if layer.window is None else at.seen_from - layer.window + 1
            tails[layer.window] = _tail(h, seen[layer.window], first)
        if tails[layer.window] is None:
            continue
        x, rope, slots = tails[layer.window]
        if refit is None:
            stages.pruned_layer(layer, x, rope, slots, *cache.layer(index))
        else:
            stages.refit_layer(layer, x, *refit.per_layer[number], rope, slots, *cache.layer(index))


def _tail(h, seen: Seen, first: int):
    """h [B, C, D], rope and slots of the tokens from number `first` on, or None if there are none."""
    C = h.shape[1]
    if first >= C:
        return None
    first = max(0, min(first, C - 2))  # torch compiles a size of 1 by itself: 2 tokens at least
    if first == 0:
        return h, seen.rope, seen.slots

    def cut(x):  # a copy: compiled code is held to the strides, and to the size of what a view is a view of
        return x[:, first:].clone(memory_format=torch.contiguous_format)

    return cut(h), tuple(cut(table) for table in seen.rope), cut(seen.slots)
