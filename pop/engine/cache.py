"""The static KV cache: preallocated, written at given slots, read up to the filled part.

Nothing is appended by concatenation, and no layer keeps a position: the caller says which slots it writes (`write` in
attention.py). So a pruned layer can write K and V without running, and a full-depth token can overwrite what the pruned
pass wrote for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pop.errors import CacheMemoryError, check_count
from pop.system.memory import free_bytes, to_device

CHUNK_SIZE = 2048  # tokens of a row that prefill runs at once by default


class KVCache:
    """Keys and values of all layers, for `batch_size` rows of up to `max_seq_len` tokens each.

    keys, values: For each layer, [B, S + 1, K, E]. The token at position p of its row is in slot p % S. The spare slot
        S takes tokens that are not kept, such as padding, and is never read. S is max_seq_len. In a layer with a
        sliding window, it is at most window - 1 + chunk_size, and the slots are a ring.
    chunk_size: How many tokens of a row may be written at once.
    lengths: The number of tokens in each row, [B] int64 on the CPU.
    previous_hidden: The state (h, the residual stream) of each row's latest token as it entered each layer, [L, B, D];
        zero in an empty row. The codes of calibrated plans read it at the next token.

    The others are for selection by later prompts, for images, for steps that are replayed, and for prefills that fail:

    skipped: For each slot, the layer at which a later prompt may select its token, because the token skipped pruned
        layers after it (earlier.py): [B, S + 1] int16. -1: it may not. From a row's length on, all are -1, since a
        decode step does not write them. Until `hold_states`, there is only the spare slot.
    entered: The states of these tokens as they entered that layer, [B, S + 1, D].
    rope_offsets: Each row's next rotary position minus its length, [B] int64 on the CPU. Not zero after images.
    passes: The decode step, and the passes of prompts, that are replayed on this cache's tensors, by class.
    intact: False while a prefill may overwrite slots of a ring or of earlier tokens, and after one that has failed.

    Of `config` it reads num_layers, windows, hidden_size, num_kv_heads and head_dim. Raises CacheMemoryError if the
    device lacks the memory.
    """

    @torch.inference_mode(False)  # so that it can be used in that mode and outside of it
    def __init__(
        self,
        config,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        chunk_size: int = CHUNK_SIZE,
    ):
        device = torch.device(device)
        batch_size = check_count("batch_size", batch_size)
        self.max_seq_len = max_seq_len = check_count("max_seq_len", max_seq_len)
        self.chunk_size = check_count("chunk_size", chunk_size)
        self.has_windows = any(config.windows)
        size = self.size_in_bytes(config, batch_size, max_seq_len, dtype, chunk_size)

        self.intact = True
        self.passes = {}  # see LayerPass.of

        with _allocating("a KV cache", batch_size, max_seq_len, size, device):
            self.lengths = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
            self.rope_offsets = torch.zeros_like(self.lengths)
            # Zeros, and zeros again in `reset`: a masked slot has attention weight 0, but 0 * NaN is NaN.
            self.keys = []
            for window in config.windows:
                # In memory [B, K, S + 1, E]. Attention goes through the slots head by head, so it reads them in order.
                shape = (batch_size, config.num_kv_heads, self.slots(window) + 1, config.head_dim)
                self.keys.append(torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2))
            self.values = list(map(torch.zeros_like, self.keys))  # with the same strides
            hidden = (config.num_layers, batch_size, config.hidden_size)
            self.previous_hidden = torch.zeros(hidden, dtype=dtype, device=device)
            self.entered, self.skipped = _empty_states(self.previous_hidden, 0)

    @staticmethod
    def size_in_bytes(
        config,
        batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype,
        chunk_size: int = CHUNK_SIZE,
        states: bool = False,
    ) -> int:
        """Bytes of keys and values, 2 B (S + 1) K E numbers a layer, and of hidden states, (L + 1) B D numbers.

        With `states`, as after `hold_states`: without windows, another S B D.
        """
        slots = sum(_slots(window, max_seq_len, chunk_size) + 1 for window in config.windows)
        hidden = config.num_layers + 1
        if states and not any(config.windows):
            hidden += max_seq_len
        numbers = 2 * slots * config.num_kv_heads * config.head_dim + hidden * config.hidden_size
        return batch_size * numbers * dtype.itemsize

    @property
    def has_states(self) -> bool:
        """Whether there is room for `entered` and `skipped`."""
        return self.skipped.shape[1] > 1

    @torch.inference_mode(False)  # as above
    def hold_states(self) -> None:
        """Make room for `entered` and `skipped`, if no layer has a window.

        The first prompt whose plan selects tokens calls this.

        Raises CacheMemoryError if the device lacks the memory.
        """
        if self.has_states or self.has_windows:
            return
        hidden = self.previous_hidden
        size = self.batch_size * self.max_seq_len * hidden[0, 0].nbytes
        with _allocating("the states of a KV cache", self.batch_size, self.max_seq_len, size, self.device):
            self.entered, self.skipped = _empty_states(hidden, self.max_seq_len)

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        return self.previous_hidden.device

    @property
    def nbytes(self) -> int:
        """Bytes of its keys, values and hidden states, as `size_in_bytes` counts them."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.previous_hidden, self.entered))

    def snapshot(self) -> tuple[Tensor, Tensor, Tensor]:
        """`lengths`, `previous_hidden` and `rope_offsets`, for `move_to`. None of them is changed in place."""
        return self.lengths, self.previous_hidden, self.rope_offsets

    def move_to(self, lengths: Tensor, previous_hidden: Tensor, rope_offsets: Tensor) -> None:
        """Let the cache hold `lengths` tokens, which must be in the slots."""
        if (lengths < self.lengths).any():
            (there,) = to_device([lengths], self.device)
            slot = torch.arange(self.skipped.shape[1], device=self.device)
            self.skipped.masked_fill_(slot >= there[:, None], -1)
        self.lengths = lengths
        self.previous_hidden = previous_hidden
        self.rope_offsets = rope_offsets

    def reset(self) -> None:
        """Empty all rows."""
        for slots in (*self.keys, *self.values):
            slots.zero_()
        self.move_to(*map(torch.zeros_like, self.snapshot()))
        self.intact = True

    def copy_from(self, other: KVCache) -> None:
        """Fill every row with the one row of `other`, a cache of the same model whose tokens fit into this one."""
        held = int(other.lengths[0])
        if other.has_states:
            self.hold_states()
        self.skipped.fill_(-1)
        mine = *self.keys, *self.values, self.entered, self.skipped
        theirs = *other.keys, *other.values, other.entered, other.skipped
        for target, source in zip(mine, theirs, strict=True):  # [B, S + 1, ...] and [1, S' + 1, ...]
            slots = target.shape[1] - 1
            other_slots = source.shape[1] - 1
            latest = torch.arange(max(0, held - min(slots, other_slots)), held, device=target.device)
            target[:, latest % slots] = source[:, latest % other_slots]
        B = self.batch_size
        self.lengths = other.lengths.repeat(B)
        self.previous_hidden = other.previous_hidden.repeat(1, B, 1)
        self.rope_offsets = other.rope_offsets.repeat(B)

    @torch.inference_mode(False)  # as above
    def keep_rows(self, rows: Tensor) -> None:
        """Keep `rows` of the batch, a tensor of indices, in that order, and free the memory of the others."""
        (device_rows,) = to_device([rows], self.device)
        for slots in (self.keys, self.values):
            for index, tensor in enumerate(slots):  # one layer at a time, so the copies need little memory
                # Heads stay before slots in memory.
                slots[index] = tensor.transpose(1, 2)[device_rows].transpose(1, 2)
        self.entered = self.entered[device_rows]
        self.skipped = self.skipped[device_rows]
        self.lengths = self.lengths[rows]
        self.previous_hidden = self.previous_hidden[:, device_rows]
        self.rope_offsets = self.rope_offsets[rows]
        self.passes = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"passes": {}}  # a copy has other tensors

    def slots(self, window: int | None) -> int:
        """S of a layer with this window."""
        return _slots(window, self.max_seq_len, self.chunk_size)


def _empty_states(hidden: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """`entered` and `skipped` of a cache whose previous_hidden is `hidden`, with room for states in S slots."""
    B, D = hidden.shape[1:]
    return hidden.new_zeros(B, slots + 1, D), hidden.new_full((B, slots + 1), -1, dtype=torch.int16)


@contextmanager
def _allocating(what: str, batch_size: int, max_seq_len: int, size: int, device: torch.device) -> Iterator[None]:
    """Allocate `size` bytes in this block. Raises CacheMemoryError before or in it if the device lacks the memory."""
    wanted = f"{size:,} bytes are needed for {what} of {batch_size} x {max_seq_len} tokens"
    advice = "ask for fewer rows or a smaller max_seq_len"
    free = free_bytes(device)
    if free is not None and size > free:
        raise CacheMemoryError(f"{wanted}, but {device} has {free:,} bytes free; {advice}")
    try:
        yield
    except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
        raise CacheMemoryError(f"{wanted}, more than {device} could allocate; {advice}") from error


def _slots(window: int | None, max_seq_len: int, chunk_size: int) -> int:
    return max_seq_len if window is None else min(max_seq_len, window - 1 + chunk_size)
