"""Which tokens a chunk has, which of them run at full depth, and what each attends.

All indices are computed on the CPU and moved to the device once, without waiting for it. Shape letters:
pop/models/layers.py; C is the number of columns of a chunk, and W that of its full-depth rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from pop.engine.attention import AttentionMetadata
from pop.engine.cache import KVCache
from pop.models.images import TextOnly
from pop.pruning.plan import PrunePlan

UNBOUNDED = 2**31  # tokens: more than any sequence has


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens [B, C] of a batch: those of a chunk, or its full-depth rows."""

    index: torch.Tensor  # [B, C] int64, where each is in its prompt; for full-depth rows, in which column of the chunk
    valid: torch.Tensor  # [B, C] bool, false for padding
    positions: torch.Tensor  # [B, C] int64, in the sequence
    rotary: torch.Tensor  # rotary positions, [B, C] int64, or [3, B, C] by axis
    last_attended: torch.Tensor | None = None  # [B, C] int64, the last position that each attends; None: its own

    def take(self, columns: torch.Tensor, valid: torch.Tensor) -> Tokens:
        """The tokens in columns [B, W], of which some are valid [B, W]."""

        def gather(x):
            return None if x is None else x.gather(-1, columns.expand(*x.shape[:-1], -1))

        return Tokens(columns, valid, *(gather(x) for x in (self.positions, self.rotary, self.last_attended)))

    def to(self, device: torch.device) -> Tokens:
        moved = {name: None if x is None else x.to(device) for name, x in vars(self).items()}
        return Tokens(**moved)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of each batch row, which go through the model together."""

    plan: PrunePlan  # without layers if no token of the chunk is pruned
    images: TextOnly  # what images bring to these tokens
    tokens: Tokens  # all tokens
    full_depth: Tokens  # the full-depth rows; a batch row with fewer than W is filled up with invalid ones
    ends: torch.Tensor  # [B] on the CPU, the length of each row after the chunk
    first_position: int  # the largest position at which a row of the chunk begins
    look_ahead: int  # how many tokens after itself a token attends at most
    is_fresh: bool  # the cache is empty and all tokens are causal, so they attend the chunk only
    # The first column of the prompt's last full-depth tokens. A layer with a window needs the window - 1 columns before
    # it, and no earlier ones.
    needed_from: int
    last: torch.Tensor  # [B], the column of each row's last token
    last_row: torch.Tensor  # [B], the number of that token among the full-depth rows, or -1
    has_tokens: torch.Tensor  # [B], false for a row that ended in an earlier chunk

    @classmethod
    def of(
        cls,
        cache: KVCache,
        lengths: torch.Tensor,
        begin: torch.Tensor,
        end: torch.Tensor,
        plan: PrunePlan,
        images: TextOnly,
        boundary: bool,
        device: torch.device,
    ) -> Chunk:
        """Tokens `begin` to `end` [B] of prompts of `lengths` [B], to be appended to the cache.

        A row with begin = end is all padding. Without a boundary, more of the prompts follows in a later call.
        """
        full_depth_last = plan.full_depth_last if boundary else 0
        C = int((end - begin).max())
        start, lengths, begin, end = (x[:, None] for x in (cache.lengths, lengths, begin, end))  # [B, 1]
        index = begin + torch.arange(C)  # [B, C]
        positions, valid = start + index, index < end
        rotary = start + cache.rope_offsets[:, None] + images.rotary(index)
        images = images.select(index, valid)
        last_attended = images.last_attended(positions)
        tokens = Tokens(index.minimum(lengths - 1), valid, positions, rotary, last_attended)

        is_first = positions < plan.full_depth_first
        full_depth = is_first | (index >= lengths - full_depth_last)
        if (full_depth | ~valid).all():
            plan = PrunePlan.none()  # nothing is left to prune
        full_depth &= valid
        count = full_depth.sum(1)  # [B]
        W = int(count.max()) if plan.layers else 0
        columns = (~full_depth).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]  # full-depth tokens first, in order

        last = (end - begin)[:, 0] - 1  # [B], -1 for a row that has ended
        last_is_full = full_depth.gather(1, last.clamp(min=0)[:, None])[:, 0] & bool(W)
        needed_from = int((lengths - begin)[end > begin].min()) - full_depth_last
        if last_attended is not None and (valid & is_first & (last_attended >= plan.full_depth_first)).any():
            needed_from = 0  # the first tokens are in an image, and attend the rest of it
        return cls(
            plan=plan,
            images=images,
            tokens=tokens.to(device),
            full_depth=tokens.take(columns, full_depth.gather(1, columns)).to(device),
            ends=(start + end)[:, 0],
            first_position=int(positions[:, 0].max()),
            look_ahead=0 if last_attended is None else int((last_attended - positions).max()),
            is_fresh=last_attended is None and not positions[:, 0].any(),
            needed_from=needed_from,
            last=last.clamp(min=0).to(device),
            last_row=(count - 1).where(last_is_full, -1).to(device),
            has_tokens=(last >= 0).to(device),
        )

    def metadata(self, module, cache: KVCache) -> dict[int | None, AttentionMetadata]:
        """The metadata of all tokens of the chunk, by the layers' window."""
        has_band = self.tokens.index.shape[1] > 1
        return attention_metadata(module, cache, self.tokens, self.ends, self if has_band else None)

    def latest(self, h: torch.Tensor, before: torch.Tensor, f: torch.Tensor | None = None) -> torch.Tensor:
        """The hidden state [B, D] of each row's last token so far.

        It is in h [B, C, D], or in f [B, W, D] if that token is at full depth. Rows without tokens keep `before`.
        """
        rows = torch.arange(len(self.last), device=h.device)
        out = h[rows, self.last]
        if f is not None:
            out = torch.where((self.last_row >= 0)[:, None], f[rows, self.last_row], out)
        return torch.where(self.has_tokens[:, None], out, before)


def attention_metadata(
    module, cache: KVCache, tokens: Tokens, ends: torch.Tensor, chunk: Chunk | None = None
) -> dict[int | None, AttentionMetadata]:
    """How tokens [B, T] attend the cache, for each window that the layers have.

    Rows have lengths `ends` [B], on the CPU, once the tokens are in the cache. `chunk` is given if the tokens are
    consecutive in each row. Then only the keys in their band are read.
    """
    filled = int(ends.max())
    ends = ends.to(tokens.positions.device)[:, None]  # [B, 1]
    # A full row may be decoded. Its token attends what the row's last token attends, so the softmax is not empty.
    own = torch.minimum(tokens.positions, ends - 1)
    last = own if tokens.last_attended is None else torch.minimum(tokens.last_attended, ends - 1)
    by_window = {}
    for window, rope in module.rope(tokens.rotary).items():
        ring = cache.slots(window)
        slots = torch.where(tokens.valid, tokens.positions % ring, ring)  # padding goes to the spare slot
        if chunk is not None and chunk.is_fresh and (window is None or filled <= window):
            by_window[window] = AttentionMetadata(rope, slots)
            continue
        key_slots, before = None, UNBOUNDED if window is None else window - 1
        if chunk is None or chunk.is_fresh or window is None:
            slot = torch.arange(min(filled, ring), device=slots.device)
            held = ends - 1 - (ends - 1 - slot) % ring  # [B, N], the latest position in each slot; negative: none
            band = (0, UNBOUNDED, UNBOUNDED) if chunk is None else (chunk.first_position, before, chunk.look_ahead)
        else:  # the ring is not in the order of positions, which a band needs
            own_key = min(chunk.first_position, before)
            held = tokens.positions[:, :1] - own_key + torch.arange(own_key + slots.shape[1], device=slots.device)
            key_slots = held % ring  # [B, N]
            band = (own_key, before, chunk.look_ahead)
        mask = (held >= 0)[:, None] & (held[:, None] <= last[..., None])  # [B, T, N]
        if window is not None:
            mask &= held[:, None] > own[..., None] - window
        by_window[window] = AttentionMetadata(rope, slots, mask, key_slots, torch.tensor(band))
    return by_window


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
