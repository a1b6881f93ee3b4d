"""Token ids and lengths that callers give in any form, as tensors."""

import torch

from pop.errors import InputError


def token_ids(tokens, dims: int, vocab_size: int) -> torch.Tensor:
    """Return token ids as an int64 tensor, [B] or [B, T] by `dims`, on the device where they are."""
    ids = _integers(tokens)
    if ids is None or ids.dim() != dims or not ids.numel():
        shape = "[batch]" if dims == 1 else "[batch, tokens]"
        raise InputError(f"tokens must be integers of shape {shape}, none of them empty, not {tokens!r:.80}")
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is not in the vocabulary of {vocab_size} tokens")
    return ids


def row_lengths(lengths, tokens: torch.Tensor) -> torch.Tensor:
    """Return the lengths of right-padded tokens [B, T] as int64 [B] on the CPU. None: no row is padded."""
    B, T = tokens.shape
    found = torch.full((B,), T) if lengths is None else _integers(lengths)
    if found is None or found.shape != (B,) or found.min() < 1 or found.max() > T:
        raise InputError(f"lengths is {lengths!r:.80}; it must hold {B} integers from 1 to {T}, one for each row")
    return found.cpu()


def _integers(values) -> torch.Tensor | None:
    """Return an int64 tensor, or None for anything that is not integers in the form of a tensor."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    other = values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    return None if other else values.to(torch.int64)
