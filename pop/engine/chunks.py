"""Which tokens a chunk has, which of them run at full depth, and what each attends.

All indices are computed on the CPU, and copied to the device without waiting for it. Those of selected tokens
(selection.py) are computed on the device. Shape letters: pop/models/layers.py; C is the number of columns of a chunk,
and W that of its full-depth tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pop.engine.attention import UNBOUNDED, AttentionMetadata
from pop.engine.cache import KVCache
from pop.models.images import TextOnly
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device

Bounds = tuple[Tensor, Tensor]  # where a chunk begins and ends in each row's prompt, [B] each


class Prompts(NamedTuple):
    """What a call appends to the cache: right-padded prompts [B, T]. All tensors are on the CPU, but ids may not be."""

    tokens: Tensor  # [B, T], ids
    lengths: Tensor  # [B]
    images: TextOnly  # what images bring to these prompts
    full_depth: Tensor  # [B, T] bool: which tokens run at full depth by their position. True for padding.


class Selection(NamedTuple):
    """The tokens that a plan has selected."""

    tokens: Tensor  # [B, T] bool, on the device
    counts: Tensor  # [B] on the CPU, how many they are


class Tokens(NamedTuple):
    """Tokens [B, C] of a batch: those of a chunk, or its full-depth tokens. All tensors are on one device."""

    positions: Tensor  # [B, C] int64, in the sequence
    valid: Tensor  # [B, C] bool, false for padding
    rotary: Tensor  # rotary positions, [B, C] int64, or [3, B, C] by axis
    last_attended: Tensor | None  # [B, C] int64, the last position that each attends; None: its own

    def take(self, columns: Tensor, valid: Tensor) -> Tokens:
        """The tokens in columns [B, W], of which some are valid [B, W]. They are where the columns are."""

        def gather(x: Tensor) -> Tensor:
            (moved,) = to_device([x], columns.device)
            return moved.gather(-1, columns.expand(*x.shape[:-1], -1))

        last_attended = None if self.last_attended is None else gather(self.last_attended)
        return Tokens(gather(self.positions), valid, gather(self.rotary), last_attended)


class Chunk(NamedTuple):
    """Consecutive tokens of each batch row, which go through the model together. Its tensors are on the device."""

    plan: PrunePlan  # without layers if no token of the chunk is pruned
    images: TextOnly  # what images bring to these tokens
    attention: dict[int | None, AttentionMetadata]  # how all tokens attend, by the layers' window
    full_attention: dict[int | None, AttentionMetadata]  # how the full-depth tokens attend
    needed_from: int  # see `first_needed`
    ids: Tensor  # [B, C]
    index: Tensor  # [B, C], where the tokens are in their prompts; T for padding
    full_columns: Tensor  # [B, W], the columns of the full-depth tokens; a row with fewer has invalid ones as well
    full_valid: Tensor  # [B, W] bool
    last: Tensor  # [B], the column of each row's last token
    last_full: Tensor  # [B], the number of that token among the full-depth tokens, or -1
    has_tokens: Tensor  # [B], false for a row that ended in an earlier chunk

    @classmethod
    def of(
        cls,
        module,
        cache: KVCache,
        prompts: Prompts,
        bounds: Bounds,
        plan: PrunePlan,
        selection: Selection | None = None,
    ) -> Chunk:
        """The part of prompts between `bounds`, to be appended to the cache. All padding where begin equals end.

        With a selection, the chunk must have all of the prompts.
        """
        device = cache.device
        begin, end = (edge[:, None] for edge in bounds)  # [B, 1] each
        C = int((end - begin).max())
        index = begin + torch.arange(C)  # [B, C]
        in_prompt = index.minimum(prompts.lengths[:, None] - 1)  # padding repeats the last token
        tokens = _tokens(cache, prompts, index, index < end)
        last = (end - begin)[:, 0] - 1  # [B], -1 for a row that has ended

        is_full = prompts.full_depth.gather(1, in_prompt) & tokens.valid  # [B, C]
        counts = is_full.sum(1)  # [B]
        last_is_full = is_full.gather(1, last.clamp(min=0)[:, None])[:, 0]
        if selection is not None:
            counts = counts + selection.counts
            is_full, indices = to_device([is_full, in_prompt], device)
            is_full = is_full | selection.tokens.gather(1, indices)  # without the last token, which padding repeats
        if (counts == tokens.valid.sum(1)).all():
            plan = PrunePlan.none()  # nothing is left to prune
        W = int(counts.max()) if plan.layers else 0
        columns = (~is_full).to(torch.uint8).argsort(dim=1, stable=True)[:, :W]  # full-depth tokens first, in order
        full = tokens.take(columns, is_full.gather(1, columns))
        last_full = (counts - 1).where(last_is_full & bool(W), -1)

        ends = cache.lengths + bounds[1]
        full_attention = attention_metadata(module, cache, full, ends) if W else {}
        ids, indices = to_device([prompts.tokens, in_prompt], device)
        small = [index.where(tokens.valid, prompts.full_depth.shape[1]), columns, full.valid]
        small += [last.clamp(min=0), last_full, last >= 0]
        index, columns, full_valid, last, last_full, has_tokens = to_device(small, device)
        return cls(
            plan=plan,
            images=prompts.images.select(begin + torch.arange(C), tokens.valid),
            attention=attention_metadata(module, cache, tokens, ends, Consecutive.of(tokens)),
            full_attention=full_attention,
            needed_from=0 if selection is not None else _needed_from(cache, prompts, bounds, tokens, plan),
            ids=ids.gather(1, indices),
            index=index,
            full_columns=columns,
            full_valid=full_valid,
            last=last,
            last_full=last_full,
            has_tokens=has_tokens,
        )

    def first_needed(self, window: int | None) -> int:
        """The first column whose K and V a pruned layer must write. With a window, no later token attends earlier ones.

        `needed_from` is the first column that may have a full-depth token, the sequence's first tokens aside, or the
        column after the prompt.
        """
        return 0 if window is None else max(0, self.needed_from - window + 1)

    def latest(self, h: Tensor, f: Tensor | None = None) -> Tensor:
        """The hidden state [B, D] of each row's last token: in h [B, C, D], or in f [B, W, D] if it is at full depth.

        For a row without tokens it is meaningless.
        """
        out = _column(h, self.last)
        if f is None:
            return out
        return _column(f, self.last_full.clamp(min=0)).where(self.last_full[:, None] >= 0, out)


def _column(h: Tensor, index: Tensor) -> Tensor:
    """h [B, C, D] at column index [B] of each row: [B, D]."""
    return h.gather(1, index[:, None, None].expand(-1, -1, h.shape[2]))[:, 0]


def _tokens(cache: KVCache, prompts: Prompts, index: Tensor, valid: Tensor) -> Tokens:
    """The prompts' tokens at index [B, C], of which some are valid [B, C]."""
    start = cache.lengths[:, None]  # [B, 1]
    positions = start + index
    rotary = start + cache.rope_offsets[:, None] + prompts.images.rotary(index)
    return Tokens(positions, valid, rotary, prompts.images.select(index, valid).last_attended(positions))


def _needed_from(cache: KVCache, prompts: Prompts, bounds: Bounds, tokens: Tokens, plan: PrunePlan) -> int:
    """`Chunk.needed_from`, of tokens between bounds."""
    positions, valid, _, last_attended = tokens
    first = plan.full_depth_first
    if last_attended is not None and (valid & (positions < first) & (last_attended >= first)).any():
        return 0  # the first tokens are in an image, and attend the rest of it
    begin, end = (edge[:, None] for edge in bounds)  # [B, 1] each
    index = torch.arange(prompts.full_depth.shape[1])
    attends = prompts.full_depth & (index >= begin) & (cache.lengths[:, None] + index >= first)  # tokens before itself
    column = index.where(attends, prompts.lengths[:, None]) - begin  # [B, T]
    return int(column[(end > begin)[:, 0]].min())


class Consecutive(NamedTuple):
    """Facts of tokens that are consecutive in each row, so that only a band of keys is read."""

    first_position: int  # the largest position at which a row begins
    look_ahead: int  # how many tokens after itself a token attends at most
    is_exact: bool  # all rows with tokens begin there, and all tokens are causal

    @classmethod
    def of(cls, tokens: Tokens) -> Consecutive:
        starts = tokens.positions[tokens.valid[:, 0], 0]  # of the rows with tokens
        first_position = int(starts.max())
        if tokens.last_attended is None:
            return cls(first_position, 0, bool((starts == first_position).all()))
        return cls(first_position, int((tokens.last_attended - tokens.positions).max()), False)


def attention_metadata(
    module, cache: KVCache, tokens: Tokens, ends: Tensor, consecutive: Consecutive | None = None
) -> dict[int | None, AttentionMetadata]:
    """How tokens [B, T] attend the cache, for each window that the layers have.

    Args:
        module: A PrunableModel.
        cache: It has room for the tokens.
        tokens: They are in the cache once `ends` [B], on the CPU, are the rows' lengths.
        ends: See `tokens`.
        consecutive: Given if the tokens are consecutive in each row. Then only the keys in their band are read.
    """
    windows = dict.fromkeys(module.config.windows)
    tables = {window: _tables(cache, tokens, ends, window, consecutive) for window in windows}
    names = [(window, name) for window in windows for name in tables[window] if name != "band"]
    # One transfer for all of them.
    rotary, *moved = to_device([tokens.rotary, *(tables[window][name] for window, name in names)], cache.device)
    for (window, name), tensor in zip(names, moved, strict=True):
        tables[window][name] = tensor
    ropes = module.rope(rotary)
    return {window: AttentionMetadata(rope, **tables[window]) for window, rope in ropes.items()}


def _tables(
    cache: KVCache, tokens: Tokens, ends: Tensor, window: int | None, consecutive: Consecutive | None
) -> dict[str, Tensor]:
    """The fields of AttentionMetadata for one window, except `rope`, not yet on the device."""
    T = tokens.positions.shape[1]
    ring = cache.slots(window)
    before = UNBOUNDED if window is None else window - 1
    # Padding attends what the row's last token attends, so no softmax is empty.
    (final,) = to_device([ends[:, None] - 1], tokens.positions.device)  # [B, 1]
    own = torch.minimum(tokens.positions, final)
    last = own if tokens.last_attended is None else torch.minimum(tokens.last_attended, final)
    first = (own - before).clamp(min=0)
    tables = {
        "slots": torch.where(tokens.valid, tokens.positions % ring, ring),  # padding goes to the spare slot
        "spans": torch.stack((first, last), dim=-1).to(torch.int32),
    }
    if T == 1:
        return tables
    held = _held_by_slot(ends, ring)
    band = (0, UNBOUNDED, UNBOUNDED, 0)
    if consecutive is not None:
        own_key = consecutive.first_position
        if window is not None:  # the ring is not in the order of positions, which a band needs
            own_key = min(own_key, before)
            held = tokens.positions[:, :1] - own_key + torch.arange(own_key + T)
            tables["key_slots"] = held % ring
        band = (own_key, before, consecutive.look_ahead, consecutive.is_exact)
    return tables | {"held": held.to(torch.int32), "band": torch.tensor(band)}


def _held_by_slot(ends: Tensor, ring: int) -> Tensor:
    """The latest position in each filled slot of a ring, once rows have `ends` [B] tokens: [B, N]; negative: none."""
    latest = ends[:, None] - 1
    slot = torch.arange(min(int(ends.max()), ring))
    return latest - (latest - slot) % ring


def full_depth_tokens(cache: KVCache, lengths: Tensor, plan: PrunePlan, boundary: bool) -> Tensor:
    """Which tokens of prompts of `lengths` [B] are at full depth by their position: [B, T] bool, true for padding.

    Without a boundary, more of the prompts follows in a later call.
    """
    ends = cache.lengths + lengths  # [B]
    if not boundary:
        ends += plan.full_depth_last  # the prompts go on, so none of these tokens is among the last
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
