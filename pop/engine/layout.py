"""Which tokens a chunk has, which of them run at full depth, and what each attends.

All indices are computed on the CPU, and copied to the device without waiting for it. Those of full-depth rows that are
selected (selection.py) are computed on the device. Shape letters: pop/models/layers.py; C is the number of columns of a
chunk, and W that of its full-depth rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from pop.engine.attention import UNBOUNDED, AttentionMetadata
from pop.engine.cache import KVCache
from pop.models.images import TextOnly
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens [B, C] of a batch: those of a chunk, or its full-depth rows. All tensors are on one device."""

    index: torch.Tensor  # [B, C] int64, where each is in its prompt; for full-depth rows, in which column of the chunk
    valid: torch.Tensor  # [B, C] bool, false for padding
    positions: torch.Tensor  # [B, C] int64, in the sequence
    rotary: torch.Tensor  # rotary positions, [B, C] int64, or [3, B, C] by axis
    last_attended: torch.Tensor | None = None  # [B, C] int64, the last position that each attends; None: its own

    def take(self, columns: torch.Tensor, valid: torch.Tensor) -> Tokens:
        """The tokens in columns [B, W], of which some are valid [B, W]. They are where the columns are."""

        def gather(x):
            if x is not None:
                return to_device([x], columns.device)[0].gather(-1, columns.expand(*x.shape[:-1], -1))

        return Tokens(columns, valid, *(gather(x) for x in (self.positions, self.rotary, self.last_attended)))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of each batch row, which go through the model together."""

    plan: PrunePlan  # without layers if no token of the chunk is pruned
    images: TextOnly  # what images bring to these tokens
    tokens: Tokens  # all tokens
    full_depth: Tokens  # the full-depth rows; a batch row with fewer than W is filled up with invalid ones
    ends: torch.Tensor  # [B] on the CPU, the length of each row after the chunk
    first_position: int  # the largest position at which a row of the chunk begins
    is_aligned: bool  # all rows with tokens begin there, and all tokens are causal
    look_ahead: int  # how many tokens after itself a token attends at most
    # The first column that may have a full-depth token, or the one after the prompt, those of full_depth_first aside. A
    # layer with a window needs the window - 1 columns before it, and no earlier ones.
    needed_from: int
    # On the device:
    ids: torch.Tensor  # [B, C], what `tokens` are
    index: torch.Tensor  # [B, C], where they are in their prompts; T for padding
    rows: torch.Tensor  # [B, W], the columns of the full-depth rows
    rows_valid: torch.Tensor  # [B, W] bool
    last: torch.Tensor  # [B], the column of each row's last token
    last_row: torch.Tensor  # [B], the number of that token among the full-depth rows, or -1
    has_tokens: torch.Tensor  # [B], false for a row that ended in an earlier chunk

    @classmethod
    def of(
        cls, cache: KVCache, ids: torch.Tensor, lengths: torch.Tensor, begin: torch.Tensor, end: torch.Tensor,
        plan: PrunePlan, images: TextOnly, full_depth: torch.Tensor,
        selected: torch.Tensor | None = None, counts: torch.Tensor | int = 0,
    ) -> Chunk:  # fmt: skip
        """Tokens `begin` to `end` [B] of prompts `ids` [B, T] of `lengths` [B], to be appended to the cache.

        A row with begin = end is all padding. full_depth [B, T], on the CPU, says which tokens run at full depth, and
        `selected` [B, T], on the device, which `counts` [B] others. With it, the chunk must have all of the prompts.
        """
        device = cache.device
        C = int((end - begin).max())
        start, lengths, begin, end = (x[:, None] for x in (cache.lengths, lengths, begin, end))  # [B, 1]
        index = begin + torch.arange(C)  # [B, C]
        positions, valid = start + index, index < end
        rotary = start + cache.rope_offsets[:, None] + images.rotary(index)
        images = images.select(index, valid)
        last_attended = images.last_attended(positions)
        tokens = Tokens(index.minimum(lengths - 1), valid, positions, rotary, last_attended)

        is_full = full_depth.gather(1, tokens.index) & valid  # [B, C]
        count, last = is_full.sum(1) + counts, (end - begin)[:, 0] - 1  # [B]; last is -1 for a row that has ended
        last_is_full = is_full.gather(1, last.clamp(min=0)[:, None])[:, 0]
        if selected is not None:
            is_full, at = to_device([is_full, tokens.index], device)
            is_full = is_full | selected.gather(1, at)  # the last token, which padding repeats, is not among them
        if (count == valid.sum(1)).all():
            plan = PrunePlan.none()  # nothing is left to prune
        W = int(count.max()) if plan.layers else 0
        columns = (~is_full).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]  # full-depth tokens first, in order
        last_row = (count - 1).where(last_is_full & bool(W), -1)
        needed_from = 0
        if selected is None:
            at = torch.arange(full_depth.shape[1])
            attends = full_depth & (at >= begin) & (start + at >= plan.full_depth_first)  # others before itself
            needed_from = int((at.where(attends, lengths) - begin)[last >= 0].min())
        is_first = positions < plan.full_depth_first
        if last_attended is not None and (valid & is_first & (last_attended >= plan.full_depth_first)).any():
            needed_from = 0  # the first tokens are in an image, and attend the rest of it
        starts = positions[last >= 0, 0]  # of the rows with tokens
        rows = tokens.take(columns, is_full.gather(1, columns))
        ids, at = to_device([ids, tokens.index], device)
        in_prompt = index.where(valid, full_depth.shape[1])
        moved = to_device([in_prompt, rows.index, rows.valid, last.clamp(min=0), last_row, last >= 0], device)
        return cls(
            plan=plan,
            images=images,
            tokens=tokens,
            full_depth=rows,
            ends=(start + end)[:, 0],
            first_position=int(starts.max()),
            is_aligned=last_attended is None and bool((starts == starts[0]).all()),
            look_ahead=0 if last_attended is None else int((last_attended - positions).max()),
            needed_from=needed_from,
            ids=ids.gather(1, at),
            **dict(zip(("index", "rows", "rows_valid", "last", "last_row", "has_tokens"), moved, strict=True)),
        )

    def latest(self, h: torch.Tensor, f: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden state [B, D] of each row's last token: in h [B, C, D], or in f [B, W, D] if it is at full depth.

        For a row without tokens it is meaningless.
        """
        out = _column(h, self.last)
        return out if f is None else _column(f, self.last_row.clamp(min=0)).where(self.last_row[:, None] >= 0, out)


def _column(h: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """h [B, C, D] at column index [B] of each row: [B, D]."""
    return h.gather(1, index[:, None, None].expand(-1, -1, h.shape[2]))[:, 0]


def attention_metadata(
    module, cache: KVCache, tokens: Tokens, ends: torch.Tensor, chunk: Chunk | None = None
) -> dict[int | None, AttentionMetadata]:
    """How tokens [B, T] attend the cache, for each window that the layers have.

    Args:
        tokens: They are in the cache once `ends` [B], on the CPU, are the rows' lengths.
        chunk: Given if the tokens are consecutive in each row. Then only the keys in their band are read.
    """
    T, filled, ends = tokens.positions.shape[1], int(ends.max()), ends[:, None]  # [B, 1]
    # Padding attends what the row's last token attends, so no softmax is empty.
    (final,) = to_device([ends - 1], tokens.positions.device)
    own = torch.minimum(tokens.positions, final)
    last = own if tokens.last_attended is None else torch.minimum(tokens.last_attended, final)
    on_device = {"rotary": tokens.rotary}
    bands = {}
    for window in dict.fromkeys(module.config.windows):
        ring = cache.slots(window)
        slots = torch.where(tokens.valid, tokens.positions % ring, ring)  # padding goes to the spare slot
        on_device[window, "slots"] = slots
        before = UNBOUNDED if window is None else window - 1
        first = (own - before).clamp(min=0)
        on_device[window, "spans"] = torch.stack((first, last), dim=-1).to(torch.int32)
        if T == 1:
            continue
        if chunk is None or window is None:
            slot = torch.arange(min(filled, ring))
            held = ends - 1 - (ends - 1 - slot) % ring  # [B, N], the latest position in each slot; negative: none
            own_key = chunk.first_position if chunk else 0
        else:  # the ring is not in the order of positions, which a band needs
            own_key = min(chunk.first_position, before)
            held = tokens.positions[:, :1] - own_key + torch.arange(own_key + T)
            on_device[window, "key_slots"] = held % ring
        on_device[window, "held"] = held.to(torch.int32)
        band = (0, UNBOUNDED, UNBOUNDED, 0) if chunk is None else (own_key, before, chunk.look_ahead, chunk.is_aligned)
        bands[window] = torch.tensor(band)
    moved = dict(zip(on_device, to_device(list(on_device.values()), cache.device), strict=True))
    return {
        window: AttentionMetadata(
            rope,
            band=bands.get(window),
            **{name: moved[window, name] for name in AttentionMetadata._fields if (window, name) in moved},
        )
        for window, rope in module.rope(moved.pop("rotary")).items()
    }


def full_depth_tokens(cache: KVCache, lengths: torch.Tensor, plan: PrunePlan, boundary: bool) -> torch.Tensor:
    """Which tokens of prompts of `lengths` [B] are at full depth by their position: [B, T] bool, true for padding.

    Without a boundary, more of the prompts follows in a later call.
    """
    index, last = torch.arange(int(lengths.max())), plan.full_depth_last if boundary else 0
    return (cache.lengths[:, None] + index < plan.full_depth_first) | (index >= lengths[:, None] - last)


def chunk_bounds(
    lengths: torch.Tensor, chunk_size: int, images: TextOnly
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Where the chunks of prompts of `lengths` [B] begin and end, each [B].

    A chunk has at most chunk_size tokens a row, and ends before an image that it cannot hold whole, row by row.
    """
    begin = torch.zeros_like(lengths)
    while (begin < lengths).any():
        end = images.chunk_ends(begin, lengths.minimum(begin + chunk_size))
        yield begin, end
        begin = end
