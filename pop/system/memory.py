"""How much memory a device has left, and copies to it."""

from contextlib import suppress

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` right now. None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None


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
