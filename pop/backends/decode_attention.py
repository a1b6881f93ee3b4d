"""CUDA: attention of one token a row over the slots of a cache.

The kernels (decode_attention_triton.py) read lengths from the device and need no mask. So one captured CUDA graph
serves all lengths. Shape letters: pop/models/layers.py.
"""

import importlib.util
import logging

import torch

from pop.engine import attention

BLOCK_BYTES = 2**13  # of K, and of V, that a program loads at once: 32 slots for heads of 128 bfloat16 numbers
LAUNCH = {"num_warps": 4, "num_stages": 3}
PROGRAMS = 2  # to each multiprocessor, if the cache has enough slots
BLOCKS_PER_PART = 4  # at least, in a full cache
MOST_PARTS = 64

logger = logging.getLogger(__name__)
_failed: set[tuple] = set()  # devices, dtypes and head widths for which Triton could not build the kernels
HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


@torch.library.custom_op("pop::cuda_decode_attention", mutates_args=())
def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: torch.Tensor, scale: float
) -> torch.Tensor:
    """Like pop.engine.attention.decode_attention, which it calls where Triton cannot build the kernels.

    That takes a GPU of sm_80 or newer, a C compiler, and enough shared memory.

    Args:
        q: [B, 1, H, E].
        keys, values: [B, S + 1, K, E], with any strides; fastest if these are multiples of 16 elements.
        spans: [B, 1, 2] int32, the first position that each row attends, and the last.
        scale: The factor on q . k.

    Returns: [B, 1, H * E].
    """
    kind = q.device, q.dtype, q.shape[-1]
    if kind not in _failed and (processors := _processors(q)):
        try:
            return attention_in_parts(q, keys, values, spans, scale, *parts_and_block(keys, processors))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no headers, too little shared memory ...: each has its own exception
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logger.warning("one-token attention runs without Triton, which fails here: %s", reason)
            _failed.add(kind)
    return attention.decode_attention(q, keys, values, spans, scale)


decode_attention.register_fake(lambda q, *_: q.new_empty(q.shape[0], 1, q.shape[2] * q.shape[3]))


def _processors(q: torch.Tensor) -> int:
    """How many multiprocessors q's device has, or 0 if Triton does not support it."""
    if not (q.is_cuda and HAS_TRITON):
        return 0
    device = torch.cuda.get_device_properties(q.device)
    return device.multi_processor_count if device.major >= 8 else 0


def parts_and_block(keys: torch.Tensor, processors: int) -> tuple[int, int]:
    """Into how many parts to divide a row's slots, and how many slots to load at once."""
    B, S, K, E = keys.shape
    block = min(64, max(16, BLOCK_BYTES // (_power_of_two(E) * keys.itemsize)))
    return min(-(-PROGRAMS * processors // (B * K)), -(-S // (BLOCKS_PER_PART * block)), MOST_PARTS), block


def attention_in_parts(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: torch.Tensor, scale: float, parts: int, block: int
) -> torch.Tensor:
    """`decode_attention` by the two kernels."""
    from pop.backends.decode_attention_triton import attention_of_part, combine_parts  # Triton loads on first use

    (B, _, H, E), K = q.shape, keys.shape[2]
    G, E2 = H // K, _power_of_two(E)
    averages = q.new_empty(B, K, parts, G, E, dtype=torch.float32)
    log_sums = q.new_empty(B, K, parts, G, dtype=torch.float32)
    out = q.new_empty(B, 1, H * E)
    strides = (*q.stride()[::2], q.stride(3), *keys.stride(), *values.stride())
    with torch.cuda.device_of(q):
        attention_of_part[B, K, parts](
            q, keys, values, spans.contiguous(), averages, log_sums, scale, keys.shape[1] - 1, *strides,
            G=G, E=E, G2=_power_of_two(G), E2=E2, BLOCK=block, **LAUNCH,
        )  # fmt: skip
        combine_parts[B * K, G](averages, log_sums, out, parts, G=G, E=E, E2=E2, MOST=MOST_PARTS)
    return out


def _power_of_two(size: int) -> int:
    """The least power of two from `size` on, and at least 16, which tl.dot needs."""
    return max(16, 1 << (size - 1).bit_length())
