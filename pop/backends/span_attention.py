"""CUDA: attention over the slots of a cache by the tokens' spans, in Triton.

The kernels (span_attention_triton.py) read spans from the device and need no mask. So one captured CUDA graph of a
decode step serves all lengths, and full-depth tokens, ragged batches, sliding windows and images with look-ahead are
one case. Shape letters: pop/models/layers.py.
"""

import importlib.util
import logging

import torch
from torch import Tensor

from pop.engine.attention import empty_output
from pop.errors import reason_of

BLOCK_BYTES = 2**13  # of K, and of V, that a program loads at once: 32 slots for heads of 128 bfloat16 numbers
QUERIES = 2**13  # 16-bit numbers of q that a program of a prompt takes: 64 queries with heads of 128 numbers
LAUNCH = {"num_warps": 4, "num_stages": 3}
PROGRAMS = 2  # to each multiprocessor, if the cache has enough slots
BLOCKS_PER_PART = 4  # at least, in a full cache
MOST_PARTS = 64
WIDTHS = {16, 32, 64, 128, 256}  # of heads; Triton's blocks are powers of two, and tl.dot takes 16 numbers or more
HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None

logger = logging.getLogger(__name__)
_failed: set[tuple] = set()  # devices, dtypes and head widths for which Triton could not build the kernels


def span_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float) -> Tensor | None:
    """Each token attends to the positions of its span, which are in the slots of a cache.

    Triton needs a GPU of sm_80 or newer, a C compiler, and enough shared memory.

    Args:
        q: [B, T, H, E].
        keys, values: [B, S + 1, K, E], with equal strides, and neighbouring numbers in a head; fastest if the other
            strides are multiples of 16 numbers.
        spans: [B, T, 2] int32, the first and the last position that each token attends to. Of each row's positions, the
            latest S are in the slots.
        scale: The factor on q . k.

    Returns: [B, T, H * E], or None where the kernels do not take q (`_processors`), or Triton cannot build them.
    """
    kind = q.device, q.dtype, q.shape[-1]
    processors = _processors(q)
    if processors == 0 or kind in _failed:
        return None
    try:
        return attention_in_parts(q, keys, values, spans, scale, *blocks_of(q, keys, processors))
    except Exception as error:  # no compiler, no headers, too little shared memory ...: each has its own exception
        warn_of(error, "Triton")
        _failed.add(kind)
        return None


def warn_of(error: Exception, kernel: str) -> None:
    """Say that attention does without a kernel from now on.

    Raises the error again if it is lack of memory or happens in a capture: neither says that the kernel fails.
    """
    if isinstance(error, torch.OutOfMemoryError) or torch.cuda.is_current_stream_capturing():
        raise error
    logger.warning("attention runs without %s, which fails here: %s", kernel, reason_of(error))


def _processors(q: Tensor) -> int:
    """How many multiprocessors q's device has, or 0 if the kernels do not take q."""
    if not (q.is_cuda and HAS_TRITON) or q.shape[-1] not in WIDTHS:
        return 0
    device = torch.cuda.get_device_properties(q.device)
    return device.multi_processor_count if device.major >= 8 else 0


def blocks_of(q: Tensor, keys: Tensor, processors: int) -> tuple[int, int, int]:
    """How many queries a program takes, how many slots it loads at once, and in how many parts the slots are."""
    B, T, H, E = q.shape
    _, slots, K, _ = keys.shape
    G = H // K
    queries = max(16, 1 << (G - 1).bit_length())  # a token's query heads
    if T > 1 and q.dtype.itemsize == 2:  # more numbers of float32 exceed the registers
        queries = min(64, QUERIES // E)
    block = min(64, max(16, BLOCK_BYTES // (E * keys.itemsize)))
    programs = B * K * -(-T * G // queries)
    parts_for_device = -(-PROGRAMS * processors // programs)
    parts_for_slots = -(-slots // (BLOCKS_PER_PART * block))
    return queries, block, min(parts_for_device, parts_for_slots, MOST_PARTS)


def attention_in_parts(
    q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float, queries: int, block: int, parts: int
) -> Tensor:
    """`span_attention` by the two kernels, with the numbers of `blocks_of`."""
    from pop.backends.span_attention_triton import attention_of_part, combine_parts  # Triton loads on first use

    B, T, H, E = q.shape
    _, slots, K, _ = keys.shape
    G = H // K
    out = empty_output(q)
    averages = out if parts == 1 else q.new_empty(parts, B, T, H, E, dtype=torch.float32)
    log_sums = q.new_empty(parts, B, T, H, dtype=torch.float32)
    inputs = q.contiguous(), keys, values, spans.contiguous()
    with torch.cuda.device_of(q):
        attention_of_part[B * -(-T * G // queries), K, parts](
            *inputs, averages, log_sums, scale, T, slots - 1, B * T * H, *keys.stride()[:3],
            G=G, E=E, M=queries, BLOCK=block, **LAUNCH,
        )  # fmt: skip
        if parts > 1:
            combine_parts[(B * T * H,)](averages, log_sums, out, parts, E=E, MOST=MOST_PARTS)
    return out
