"""Which tokens a chunk has, which of them run at full depth, and what each attends to.

Sizes, positions and what is padding are computed on the CPU and copied to the device. Nothing here waits for it. There,
what the full-depth tokens attend to is taken from what all tokens attend to, since only the device knows which tokens
are selected (selection.py). Shape letters: pop/models/layers.py. T is the length of the longest prompt. C is the number
of columns of a chunk, and W that of its full-depth tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pop.engine.attention import UNBOUNDED, AttentionMetadata, Band, ByWindow, by_row
from pop.engine.cache import KVCache
from pop.models.images import Images
from pop.models.layers import Ropes
from pop.pruning.plan import PrunePlan
from pop.system.memory import stepped, to_device

ALL_KEYS = Band(0, UNBOUNDED, UNBOUNDED, is_exact=False)  # of tokens that are not consecutive
Bounds = tuple[Tensor, Tensor]  # where a chunk begins and ends in each row's prompt, [B] each


class Prompts(NamedTuple):
    """What a call appends to the cache: right-padded prompts [B, T]. All tensors are on the CPU, but ids may not be."""

    tokens: Tensor  # [B, T or more], ids
    lengths: Tensor  # [B]
    images: Images  # what images bring to these prompts
    full_depth: Tensor  # [B, T] bool: which tokens run at full depth by their position. True for padding.
    # Whether sizes go up in steps, with padding, so that prompts of all lengths have few sizes. Only for one chunk of
    # text in an empty cache.
    has_stepped_sizes: bool = False
    is_last_part: bool = True  # of the prompts. If not, more of the same prompts follows in a later call


class Selection(NamedTuple):
    """The tokens that a plan has selected."""

    tokens: Tensor  # [B, T] bool, on the device
    counts: Tensor  # [B] on the CPU, how many they are


class Chunk(NamedTuple):
    """Consecutive tokens of each batch row, which go through the model together. Unless stated, on the device."""

    in_prompt: Tensor  # [B, C], the columns of the prompts [B, T]; in padding, some column of the row. On the CPU
    valid: Tensor  # [B, C] bool, false for padding. On the CPU
    images: Images  # what images bring to these tokens; all but their features is on the CPU
    attention: ByWindow  # how the tokens attend
    ids: Tensor  # [B, C]
    target: Tensor  # [B, C], where results go in the prompts' columns [B, T + 1]; padding goes to column T
    last: Tensor  # [B], the column of each row's last token
    has_tokens: Tensor  # [B], false for a row that ended in an earlier chunk

    @classmethod
    def of(cls, module, cache: KVCache, prompts: Prompts, bounds: Bounds) -> Chunk:
        """The part of prompts between `bounds`, to be appended to the cache. All padding where begin equals end."""
        begin, end = bounds
        C = int((end - begin).max())
        if prompts.has_stepped_sizes:
            C = min(stepped(C), cache.chunk_size, cache.max_seq_len)
        index = begin[:, None] + torch.arange(C)  # [B, C]
        in_prompt = index.minimum(prompts.lengths[:, None] - 1)
        valid = index < end[:, None]
        target = index.where(valid, prompts.full_depth.shape[1])
        last = end - begin - 1  # [B], -1 for a row that has ended
        rotary = (cache.lengths + cache.rope_offsets)[:, None] + prompts.images.rotary(index)
        on_cpu = [prompts.tokens, in_prompt, target, last.clamp(min=0), last >= 0, rotary]
        tokens, columns, target, last, has_tokens, rotary = to_device(on_cpu, cache.device)
        positions = cache.lengths[:, None] + index
        ends = cache.lengths + end
        images = prompts.images.at(index, valid)
        ropes = module.rope(rotary)
        return cls(
            in_prompt=in_prompt,
            valid=valid,
            images=images,
            attention=attention_metadata(ropes, cache, positions, ends, images.last_attended(positions)),
            ids=tokens.gather(1, columns),
            target=target,
            last=last,
            has_tokens=has_tokens,
        )

    def latest(self, h: Tensor) -> Tensor:
        """The hidden state [B, D] of each row's last token in h [B, C, D]. For a row without tokens, meaningless."""
        return h.take_along_dim(self.last[:, None, None], dim=1)[:, 0]


class FullDepth(NamedTuple):
    """The W tokens of each row of a chunk that run a plan's pruned layers.

    W is 0 if the chunk has no such tokens, and if none of its tokens is pruned. Then `attention` is empty.
    """

    plan: PrunePlan  # without layers if no token of the chunk is pruned
    attention: ByWindow  # how the full-depth tokens attend
    # [B, W], in order. Shorter rows are padded on the left with other columns, whose results are discarded: K
    # and V go to the spare slot, and h is put back. So the last column is that of each row's latest full-depth token.
    columns: Tensor
    valid: Tensor  # [B, W] bool, false for this padding
    last_is_full: Tensor  # [B, 1] bool, whether a row's last token in the chunk is at full depth in `prompts`

    @classmethod
    def of(
        cls, cache: KVCache, chunk: Chunk, prompts: Prompts, plan: PrunePlan, selection: Selection | None = None
    ) -> FullDepth:
        """The tokens of a chunk that are at full depth in `prompts`, and those of a selection.

        With a selection, the chunk has to be all of the prompts. If there are several chunks, two_phases.py puts
        the selected tokens into `prompts.full_depth` instead.
        """
        sizes = chunk.valid.sum(1)  # [B]
        is_full = prompts.full_depth.gather(1, chunk.in_prompt) & chunk.valid  # [B, C]
        last_is_full = is_full.gather(1, (sizes - 1).clamp(min=0)[:, None])  # [B, 1]
        counts = is_full.sum(1)  # [B]
        if selection is not None:
            counts += selection.counts
        if (counts == sizes).all():
            plan = PrunePlan.none()  # nothing is left to prune
        W = int(counts.max()) if plan.layers else 0
        if prompts.has_stepped_sizes:
            W = min(stepped(W), chunk.valid.shape[1])
        valid = torch.arange(W) >= W - counts[:, None]  # [B, W]; here padding comes first
        if W == 0:
            no_columns = valid.long()  # [B, 0]
            return cls(plan, {}, no_columns, valid, last_is_full)

        is_full, valid, last_is_full = to_device([is_full, valid, last_is_full], cache.device)
        if selection is not None:
            is_full[:, : selection.tokens.shape[1]] |= selection.tokens  # the columns after these are padding
        # False comes before true, so the last W are the full-depth tokens, in order.
        columns = is_full.to(torch.uint8).argsort(dim=1, stable=True)[:, -W:]
        places = by_row(columns)
        attention = {}
        for window, of_all in chunk.attention.items():
            rope = tuple(table[places] for table in of_all.rope)
            slots = of_all.slots[places].where(valid, cache.slots(window))
            spans = of_all.spans[places]
            if W == 1:  # one token a row needs only spans, as in decode
                attention[window] = AttentionMetadata(rope, slots, spans)
            else:
                # These tokens are not consecutive. So they attend to all keys of the chunk, and spans mask the others.
                attention[window] = of_all._replace(rope=rope, slots=slots, spans=spans, band=torch.tensor(ALL_KEYS))
        return cls(plan, attention, columns, valid, last_is_full)


def attention_metadata(
    ropes: Ropes, cache: KVCache, positions: Tensor, ends: Tensor, last_attended: Tensor | None = None
) -> ByWindow:
    """How consecutive tokens attend to the cache, for each window that the layers have.

    Of the keys, several tokens with a window read only those that they may attend to. For tokens that are not
    consecutive, ALL_KEYS has to replace the band.

    Args:
        ropes: The tokens' rotary tables, on the device. The other tensors are on the CPU, or all on the device.
        cache: It has room for the tokens.
        positions: [B, C] int64, in the sequence. Those from `ends` on are padding.
        ends: The rows' lengths [B] once the tokens are in the cache.
        last_attended: [B, C] int64, the last position that each attends to. None: its own.
    """
    C = positions.shape[1]
    valid = positions < ends[:, None]  # [B, C]
    # Padding attends to what the row's last token attends to, so no softmax is empty.
    final = ends[:, None] - 1  # [B, 1]
    own = torch.minimum(positions, final)
    last = own if last_attended is None else torch.minimum(last_attended, final)
    attention = {}
    for window, rope in ropes.items():
        ring = cache.slots(window)
        before = UNBOUNDED if window is None else window - 1
        first = (own - before).clamp(min=0)
        slots = torch.where(valid, positions % ring, ring)  # padding goes to the spare slot
        spans = torch.stack((first, last), dim=-1).to(torch.int32)
        if C == 1:
            attention[window] = AttentionMetadata(rope, *to_device([slots, spans], cache.device))
            continue
        starts = positions[valid[:, 0], 0]  # of the rows with tokens
        start = int(starts.max())
        is_exact = bool((starts == start).all())
        look_ahead = 0
        if last_attended is not None:
            look_ahead = int((last_attended - positions).max())
            is_exact = False
        if window is None:
            # One band for all rows, that of the row which begins last. It covers the keys of the others. Spans mask the
            # rest.
            own_key = start
            # At least as many keys as columns, so that replayed passes have few sizes.
            held = torch.arange(min(max(int(ends.max()), C), ring)).expand(len(ends), -1)
            key_slots = []
        else:
            # A ring is not in the order of positions, which a band needs. So each row's keys are numbered from its own
            # start. All rows have as many keys before it, those of the row that begins last. Negative positions hold no
            # key, and spans mask them.
            own_key = min(start, before)
            held = positions[:, :1] - own_key + torch.arange(own_key + C)
            key_slots = [held % ring]
        band = torch.tensor(Band(own_key, before, look_ahead, is_exact))
        tensors = to_device([slots, spans, held.to(torch.int32), *key_slots], cache.device)
        attention[window] = AttentionMetadata(rope, *tensors, band=band)
    return attention


def full_depth_by_position(cache: KVCache, lengths: Tensor, plan: PrunePlan, is_last_part: bool) -> Tensor:
    """Which tokens of prompts of `lengths` [B] are at full depth by their position: [B, T] bool, true for padding.

    If it is not the last part, more of the prompts follows in a later call.
    """
    ends = cache.lengths + lengths  # [B]
    if not is_last_part:  # more follows, so no prompt is short, and none of these tokens is among the last
        plan = dataclasses.replace(plan, full_depth_below=0)
        ends += plan.full_depth_last
    positions = cache.lengths[:, None] + torch.arange(int(lengths.max()))  # [B, T]
    return plan.at_full_depth(positions, ends[:, None])


def chunk_bounds(prompts: Prompts, chunk_size: int) -> Iterator[Bounds]:
    """Where the chunks of prompts begin and end.

    A chunk has at most chunk_size tokens a row, and ends before an image that it cannot hold whole, row by row.
    """
    lengths = prompts.lengths
    begin = torch.zeros_like(lengths)
    while (begin < lengths).any():
        end = prompts.images.chunk_ends(begin, lengths.minimum(begin + chunk_size))
        yield begin, end
        begin = end
