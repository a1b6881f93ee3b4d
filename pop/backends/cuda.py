"""CUDA: attention by kernels that we choose.

F.scaled_dot_product_attention chooses a kernel by sizes. On recent GPUs it takes cuDNN, which builds a plan for each
new size and stride. On others, a mask and grouped heads lead to plain products in float32. Here the choice is fixed:

    flash attention     16-bit dtypes without a mask: causal, in a sliding window, or all to all
    memory-efficient    the same in float32, with wide heads, and on GPUs older than sm_80; masks without a cache
    span attention      over a cache, whatever is not causal in all rows alike: see span_attention.py

The first two are torch's, and have gradients. All work in blocks, and read the cache in place. Shape letters:
pop/models/layers.py; N is the number of keys.
"""

import functools
import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as implementations

from pop.backends.span_attention import span_attention, warn_of
from pop.engine import attention as engine
from pop.engine.attention import UNBOUNDED, AttentionMetadata, Band
from pop.models import layers

aten = torch.ops.aten
# Private operators of torch, which only `_flash` and `_efficient` call, with their first arguments in torch 2.6 and
# 2.13. If a version has other arguments, torch chooses the kernel.
ARGUMENTS = {
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask "
    "scale window_size_left window_size_right",
    "_efficient_attention_forward": "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p custom_mask_type compute_log_sumexp scale seqlen_k window_size",
}


def has_arguments(operator: str, names: str) -> bool:
    """Whether torch has an operator whose arguments begin with these names."""
    if not hasattr(aten, operator):
        return False
    arguments = getattr(aten, operator).default._schema.arguments
    return " ".join(argument.name for argument in arguments).startswith(names)


HAS_KERNELS = torch.version.cuda is not None and all(has_arguments(*item) for item in ARGUMENTS.items())
WIDEST = 256  # heads that flash attention takes
WIDEST_TRAINED = 192  # the same with gradients, for which wider heads exceed the shared memory of some GPUs
ALIGNMENT = 8  # the kernels load 16 bytes at once, so heads and rows of a mask are multiples of 8 numbers
# Which implementation of flash attention replaces torch's, if any. Older versions of torch have only their own.
chosen_flash = getattr(implementations, "current_flash_attention_impl", lambda: None)


def cache_attention(q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float) -> Tensor:
    """Like pop.engine.attention.cache_attention."""
    return attend_cache(q, keys, values, metadata.spans, metadata.held, metadata.key_slots, metadata.band, scale)


@torch.library.custom_op("pop::cuda_cache_attention", mutates_args=())
def attend_cache(
    q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, held: Tensor | None, key_slots: Tensor | None,
    band: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """It is a custom operator because compiled code must not depend on the numbers in a band."""
    metadata = AttentionMetadata((), None, spans, held, key_slots, band)
    is_exact = False
    if band is not None:
        own, before, _, is_exact = Band(*band.tolist())
    if is_exact and is_supported(q):
        k, v = engine.read(keys, values, metadata)
        attended = slice(max(0, own - before), own + q.shape[1])
        return fused_attention(q, k[:, attended], v[:, attended], scale, before).flatten(2)
    out = span_attention(q, keys, values, spans, scale)
    return engine.cache_attention(q, keys, values, metadata, scale) if out is None else out


attend_cache.register_fake(engine.empty_output)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, last_attended: Tensor | None = None
) -> Tensor:
    """Like pop.models.layers.causal_attention."""
    if not is_supported(q):
        return layers.causal_attention(q, k, v, scale, window, last_attended)
    T = q.shape[1]
    has_window = window is not None and window < T
    before = window - 1 if has_window else UNBOUNDED
    mask = None
    # The gradients of the memory-efficient kernel ignore its own windows, so the window is in the mask.
    if last_attended is not None or (has_window and not has_flash(q)):
        mask = layers.causal_mask(T, window, last_attended, q.device)
    return fused_attention(q, k, v, scale, before, mask).flatten(2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Like pop.models.layers.masked_attention."""
    if not is_supported(q):
        return layers.masked_attention(q, k, v, mask, scale)
    return fused_attention(q, k, v, scale, mask=mask).flatten(2)


def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Like F.scaled_dot_product_attention(q, k, v) in a vision tower: each [N, H, P, E]."""
    if not is_supported(q):
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, P, H, E]
    return fused_attention(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2)


def is_supported(q: Tensor) -> bool:
    """Whether one of the kernels takes q. Those for bfloat16 need sm_80."""
    if not (HAS_KERNELS and q.is_cuda) or q.shape[-1] % ALIGNMENT:
        return False
    return q.dtype in (torch.float16, torch.float32) or (q.dtype == torch.bfloat16 and _is_recent(q))


def has_flash(q: Tensor) -> bool:
    """Whether flash attention takes q [B, T, H, E]."""
    widest = WIDEST_TRAINED if torch.is_grad_enabled() else WIDEST
    return q.dtype.itemsize == 2 and q.shape[-1] <= widest and _is_recent(q)


def _is_recent(q: Tensor) -> bool:
    return torch.cuda.get_device_properties(q.device).major >= 8


@functools.cache  # once in a process, also if it fails
def use_flash_3(capability: int) -> None:
    """Let FlashAttention-3 replace torch's flash attention on GPUs of sm_90, unless another one does already."""
    if capability == 9 and find_spec("flash_attn_interface") and chosen_flash() is None:
        try:
            implementations.activate_flash_attention_impl("FA3")
        except Exception as error:  # made for another version of torch, or of CUDA ...: each has its own exception
            warn_of(error, "FlashAttention-3")


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, before: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """q [B, T, H, E] attends to k and v [B, N, K, E] -> [B, T, H, E], by one of the two kernels.

    Args:
        before: How many keys before its own a token attends to at most. It attends to none after its own. The last
            token's own key is the last one. None: each token attends to all keys.
        mask: [B or 1, T, N] bool, true where a token attends to a key. It replaces `before`.
    """
    if mask is None and has_flash(q):
        return _flash(q, k, v, scale, before)
    return _efficient(q, k, v, scale, before, mask)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int | None) -> Tensor:
    options = {"scale": scale}
    if before is not None and before < UNBOUNDED:
        options |= {"window_size_left": before, "window_size_right": 0}
    lengths = q.shape[1], k.shape[1]
    causal = before is not None
    try:
        return aten._flash_attention_forward(q, k, v, None, None, *lengths, 0.0, causal, False, **options)[0]
    except RuntimeError as error:
        if chosen_flash() is None:
            raise
        warn_of(error, "FlashAttention-3")
    implementations.restore_flash_attention_impl()
    return _flash(q, k, v, scale, before)  # by torch's own


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int | None, mask: Tensor | None) -> Tensor:
    """The memory-efficient kernel. It knows no groups of query heads, so it runs once for each of the G in a group."""
    N, K = k.shape[1:3]
    bias = None
    if mask is not None:
        # Rows of numbers that are added to the scores, each aligned.
        bias = q.new_full((*mask.shape[:2], N + -N % ALIGNMENT), -math.inf)[..., :N].masked_fill_(mask, 0)
        bias = bias[:, None].expand(len(q), K, -1, N)
        before = None
    causal_type = 0 if before is None else 2  # 2 aligns queries and keys at the end
    options = {"scale": scale}
    if before is not None and before < UNBOUNDED:
        options["window_size"] = before + 1
    gradients = torch.is_grad_enabled()
    results = [
        aten._efficient_attention_forward(heads, k, v, bias, *[None] * 4, 0.0, causal_type, gradients, **options)[0]
        for heads in q.unflatten(2, (K, -1)).unbind(3)  # [B, T, K, E] each
    ]
    return torch.stack(results, dim=3).flatten(2, 3)
