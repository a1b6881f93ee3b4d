"""How much memory a device has left, copies to it, and sizes that fit many uses."""

import math
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

CGROUP = "/sys/fs/cgroup"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` right now. None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        with suppress(OSError, StopIteration):
            return min(1024 * _number("/proc/meminfo", "MemAvailable:"), _free_in_container())
    return None


def _free_in_container() -> float:
    """Bytes that the limit of a container (cgroup, version 2) leaves. Infinity without a limit."""
    with suppress(OSError, StopIteration, ValueError):
        limit = int(Path(CGROUP, "memory.max").read_text())  # "max": none
        used = int(Path(CGROUP, "memory.current").read_text())
        statistics = f"{CGROUP}/memory.stat"
        files = _number(statistics, "file") - _number(statistics, "shmem")  # those of a disk give way
        return limit - used + files
    return math.inf


def _number(path: str, name: str) -> int:
    """The number after a name in a file of the kernel."""
    with open(path, encoding="ascii") as lines:
        return next(int(words[1]) for words in map(str.split, lines) if words[0] == name)


def to_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Integer and boolean tensors, those on the CPU copied to `device` in one transfer, which nothing waits for."""
    away = [tensor for tensor in tensors if tensor.device.type != device.type]
    if not away:
        return tensors
    numbers = torch.cat([tensor.flatten().to(torch.int64) for tensor in away])
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # torch keeps it until the copy has ended
    parts = numbers.to(device, non_blocking=True).split([tensor.numel() for tensor in away])
    # Copies, not views: compiled code would be specialised to the size of their base, and to where they are in it.
    copies = (part.view(x.shape).to(x.dtype, copy=True) for part, x in zip(parts, away, strict=True))
    return [tensor if tensor.device.type == device.type else next(copies) for tensor in tensors]


def stepped(size: int) -> int:
    """Round up to one of 1, 2, ..., 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...: four sizes for each doubling."""
    step = max(1, (1 << size.bit_length()) // 8)
    return -(-size // step) * step
