"""CUDA: attention of one token a row over the slots of a cache, in Triton.

The kernels (decode_attention_triton.py) read lengths from the device and need no mask. So one captured CUDA graph
serves all lengths. Shape letters: pop/models/layers.py.
"""

import importlib.util
import logging

import torch
from torch import Tensor

from pop.engine import attention

BLOCK_BYTES = 2**13  # of K, and of V, that a program loads at once: 32 slots for heads of 128 bfloat16 numbers
LAUNCH = {"num_warps": 4, "num_stages": 3}
PROGRAMS = 2  # to each multiprocessor, if the cache has enough slots
BLOCKS_PER_PART = 4  # at least, in a full cache
MOST_PARTS = 64
WIDTHS = {16, 32, 64, 128, 256}  # of heads; Triton's blocks are powers of two, and tl.dot takes 16 numbers or more
HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None

logger = logging.getLogger(__name__)
_failed: set[tuple] = set()  # devices, dtypes and head widths for which Triton could not build the kernels


@torch.library.custom_op("pop::cuda_decode_attention", mutates_args=())
def decode_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float) -> Tensor:
    """Like pop.engine.attention.decode_attention, which it calls where Triton cannot build the kernels.

    Triton needs a GPU of sm_80 or newer, a C compiler, and enough shared memory.

    Args:
        q: [B, 1, H, E].
        keys, values: [B, S + 1, K, E], with equal strides, and neighbouring numbers in a head; fastest if the other
            strides are multiples of 16 numbers.
        spans: [B, 1, 2] int32, the first and the last position that each row attends.
        scale: The factor on q . k.

    Returns: [B, 1, H * E].
    """
    kind = q.device, q.dtype, q.shape[-1]
    processors = _processors(q)
    if processors == 0 or kind in _failed:
        return attention.decode_attention(q, keys, values, spans, scale)
    parts, block = parts_and_block(keys, processors)
    try:
        return attention_in_parts(q, keys, values, spans, scale, parts, block)
    except Exception as error:  # no compiler, no headers, too little shared memory ...: each has its own exception
        # These say nothing about Triton: too little memory, and whatever ends a capture.
        if isinstance(error, torch.OutOfMemoryError) or torch.cuda.is_current_stream_capturing():
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        logger.warning("one-token attention runs without Triton, which fails here: %s", reason)
        _failed.add(kind)
        return attention.decode_attention(q, keys, values, spans, scale)


decode_attention.register_fake(attention.empty_output)


def _processors(q: Tensor) -> int:
    """How many multiprocessors q's device has, or 0 if the kernels do not take q."""
    if not (q.is_cuda and HAS_TRITON) or q.shape[-1] not in WIDTHS:
        return 0
    device = torch.cuda.get_device_properties(q.device)
    return device.multi_processor_count if device.major >= 8 else 0


def parts_and_block(keys: Tensor, processors: int) -> tuple[int, int]:
    """Into how many parts to divide a row's slots, and how many slots to load at once."""
    B, slots, K, E = keys.shape
    block = min(64, max(16, BLOCK_BYTES // (E * keys.itemsize)))
    fill_the_device = -(-PROGRAMS * processors // (B * K))
    have_enough_slots = -(-slots // (BLOCKS_PER_PART * block))
    return min(fill_the_device, have_enough_slots, MOST_PARTS), block


def attention_in_parts(
    q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float, parts: int, block: int
) -> Tensor:
    """`decode_attention` by the two kernels, which divide each row's slots into `parts` and load `block` at once."""
    from pop.backends.decode_attention_triton import attention_of_part, combine_parts  # Triton loads on first use

    B, _, H, E = q.shape
    _, slots, K, _ = keys.shape
    if values.stride() != keys.stride() or keys.stride(3) != 1:
        raise ValueError(f"keys and values have the strides {keys.stride()} and {values.stride()}")
    G = H // K
    G2 = max(16, 1 << (G - 1).bit_length())  # the next power of two that tl.dot takes
    averages = q.new_empty(B, K, parts, G, E, dtype=torch.float32)
    log_sums = q.new_empty(B, K, parts, G, dtype=torch.float32)
    out = attention.empty_output(q)
    inputs = q.contiguous(), keys, values, spans.contiguous()
    with torch.cuda.device_of(q):
        attention_of_part[B, K, parts](
            *inputs, averages, log_sums, scale, slots - 1, *keys.stride()[:3],
            G=G, E=E, G2=G2, BLOCK=block, **LAUNCH,
        )  # fmt: skip
        combine_parts[B * K, G](averages, log_sums, out, parts, G=G, E=E, MOST=MOST_PARTS)
    return out
