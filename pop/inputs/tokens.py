"""Token ids and lengths that callers give in any form, as tensors."""

from __future__ import annotations

from operator import index

import torch

from pop.errors import InputError


def token_ids(tokens, dims: int, vocab_size: int) -> torch.Tensor:
    """Token ids as an int64 tensor, on the device where they are.

    Args:
        tokens: a tensor, an array or nested lists of ids from 0 to vocab_size - 1, not empty.
        dims: 1 for [B] or 2 for [B, T].
        vocab_size: V.
    """
    shape = "[batch, tokens]" if dims == 2 else "[batch]"
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"tokens must be integers of shape {shape}: {error}") from None
    if 0 in tokens.shape:
        raise InputError("tokens is empty; give at least one")
    if tokens.dim() != dims or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"tokens must be integers of shape {shape}, not {tokens.dtype} of shape {list(tokens.shape)}")
    tokens = tokens.to(torch.int64)
    low, high = torch.stack(tokens.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is not in the vocabulary of {vocab_size} tokens")
    return tokens


def row_lengths(lengths, tokens: torch.Tensor) -> torch.Tensor:
    """The lengths of the rows of right-padded tokens [B, T], as a tensor [B] on the CPU. None: no row is padded."""
    B, T = tokens.shape
    if lengths is None:
        return torch.full((B,), T)
    try:
        values = [index(length) for length in (lengths.tolist() if hasattr(lengths, "tolist") else lengths)]
    except TypeError:
        raise InputError(f"lengths must be integers, one for each row of tokens, not {lengths!r}") from None
    if len(values) != B or not all(1 <= value <= T for value in values):
        raise InputError(f"lengths is {values}; it must hold {B} numbers from 1 to {T}, one for each row of tokens")
    return torch.tensor(values)
