"""The static KV cache: preallocated, written at given positions, read up to the filled part.

There is no "current position" inside a layer and nothing is ever appended by concatenation: whoever writes says
where. That is what lets a pruned layer write K and V without running, and a full-depth token overwrite what the
pruned pass had left at its position.
"""

from __future__ import annotations

import torch

from pop.errors import CacheMemoryError, check_count

CHUNK_SIZE = 2048  # tokens of a prompt that prefill runs at once, unless told otherwise


class KVCache:
    """Keys and values of all layers for `batch_size` rows of up to `max_seq_len` tokens each.

    keys[l], values[l]: [B, S + 1, K, E] of `dtype` on `device`. The token at position p of its row is in slot p % S;
        the spare slot S takes what belongs nowhere and is never read. S = max_seq_len: all tokens are held. But a
        layer with a window holds only what a chunk of tokens can see: S = window - 1 + chunk_size, if that is less.
        At least 2.
    chunk_size: tokens of a row that may be written at once, at most.
    lengths: [B] int64 on the CPU, the tokens held by each row.
    states: [L, B, D], the residual stream of each row's latest token as it entered each layer, zero in an empty row.
        A refit projection with two taps (pop/pruning/projections.py) looks back at it from the next token.
    shifts: [B] int64 on the CPU, by how much each row's next rotary position differs from its next position, which is
        its length. Only images make it differ from 0: see Images.positions in pop/models/layers.py.
    intact: False if a prefill in several chunks has failed on the way, and layers with windows have lost tokens that
        `lengths` counts.

    `point` is where all rows are now; who sets it back to an earlier one, to go on from there again, may do so by no
    more than chunk_size tokens if layers have windows.

    Raises CacheMemoryError, with the size in bytes, when the device has no room for it.
    """

    def __init__(
        self,
        config,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chunk_size: int = CHUNK_SIZE,
    ):
        batch_size = check_count("batch_size", batch_size)
        max_seq_len = check_count("max_seq_len", max_seq_len)
        self.max_seq_len, self.chunk_size = max_seq_len, check_count("chunk_size", chunk_size)
        size = self.size_in_bytes(config, batch_size, max_seq_len, dtype, chunk_size)

        wanted = f"a KV cache of {batch_size} x {max_seq_len} tokens takes {size:,} bytes"
        advice = "ask for fewer rows or a smaller max_seq_len"
        free = _free_bytes(device)
        if free is not None and size > free:
            raise CacheMemoryError(f"{wanted}, but {device} has {free:,} bytes free; {advice}")
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.shifts = torch.zeros(batch_size, dtype=torch.int64)
        self.intact = True

        slots = [_slots(window, max_seq_len, chunk_size) for window in config.windows]
        try:
            # Zeros, and zeros again in `reset`: a masked slot has attention weight 0, but 0 * NaN is NaN.
            self.keys = [empty_slots(config, batch_size, S, dtype, device) for S in slots]
            self.values = [empty_slots(config, batch_size, S, dtype, device) for S in slots]
            self.states = torch.zeros(config.num_layers, batch_size, config.hidden_size, dtype=dtype, device=device)
        except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
            raise CacheMemoryError(f"{wanted}, more than {device} could allocate; {advice}") from error

    @staticmethod
    def size_in_bytes(
        config, batch_size: int, max_seq_len: int, dtype: torch.dtype, chunk_size: int = CHUNK_SIZE
    ) -> int:
        """Size of keys and values, 2 B (S + 1) K E numbers a layer, and of the states, L B D numbers."""
        slots = sum(_slots(window, max_seq_len, chunk_size) + 1 for window in config.windows)
        numbers = 2 * slots * config.num_kv_heads * config.head_dim + config.num_layers * config.hidden_size
        return batch_size * numbers * dtype.itemsize

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def point(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the rows are: lengths, states and shifts, none of which is ever changed in place."""
        return self.lengths, self.states, self.shifts

    @point.setter
    def point(self, point: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self.lengths, self.states, self.shifts = point

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on the device: `size_in_bytes`."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, self.states))

    def reset(self) -> None:
        """Empty all rows."""
        for slots in (*self.keys, *self.values):
            slots.zero_()
        self.point = tuple(map(torch.zeros_like, self.point))
        self.intact = True

    def copy(self, other: KVCache) -> None:
        """Make every row hold what `other`, a cache of the same model with one row, holds; this one has room for it."""
        held = int(other.lengths[0])
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for to, source in zip(mine, theirs, strict=True):  # [B, S + 1, K, E] and [1, S' + 1, K, E]
                slots, other_slots = to.shape[1] - 1, source.shape[1] - 1
                latest = torch.arange(max(0, held - min(slots, other_slots)), held, device=to.device)
                to[:, latest % slots] = source[:, latest % other_slots]
        B = self.batch_size
        self.point = other.lengths.repeat(B), other.states.repeat(1, B, 1), other.shifts.repeat(B)

    def slots(self, window: int | None) -> int:
        """S of a layer with this window."""
        return _slots(window, self.max_seq_len, self.chunk_size)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [B, S + 1, K, E]: what `write` writes to."""
        return self.keys[index], self.values[index]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep `rows` [R] of the batch, in that order, and drop the others; memory falls with them."""
        device_rows = rows.to(self.states.device)
        for slots in (self.keys, self.values):
            for index, tensor in enumerate(slots):  # one layer at a time: the copy is small beside the cache
                slots[index] = tensor.transpose(1, 2)[device_rows].transpose(1, 2)  # laid out as before
        self.point = self.lengths[rows], self.states[:, device_rows], self.shifts[rows]


def empty_slots(config, batch_size: int, slots: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Keys or values of a layer with so many slots and the spare one: zeros [B, S + 1, K, E].

    In memory a head's slots lie side by side, so that attention, which goes through them head by head, reads on and on.
    """
    shape = (batch_size, config.num_kv_heads, slots + 1, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)


def _slots(window: int | None, max_seq_len: int, chunk_size: int) -> int:
    slots = max_seq_len if window is None else min(max_seq_len, window - 1 + chunk_size)
    return max(2, slots)  # torch compiles a size of 1 by itself


def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write k, v [B, T, K, E] at slots [B, T] of keys and values [B, S + 1, K, E], in place."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]  # [B, 1]
    keys[rows, slots] = k.to(keys.dtype)
    values[rows, slots] = v.to(values.dtype)


def read(keys: torch.Tensor, values: torch.Tensor, slots: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v [B, N, K, E] of the first so many slots of keys and values [B, S + 1, K, E], or of slots [B, N]."""
    if not isinstance(slots, torch.Tensor):
        return keys[:, :slots], values[:, :slots]
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]  # [B, 1]
    return keys[rows, slots], values[rows, slots]


def _free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` right now, or None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reusable
    if device.type == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                for line in lines:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
    return None
