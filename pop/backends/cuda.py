"""CUDA: attention of several tokens, by kernels that we choose.

F.scaled_dot_product_attention chooses by sizes. On recent GPUs it takes cuDNN, which builds a plan for each new size
and stride. On others, a mask and grouped heads lead to plain products in float32. Here the choice is fixed:

    flash attention     16-bit dtypes without a mask: causal, in a sliding window, or all to all
    memory-efficient    masks, float32, wide heads, and GPUs older than sm_80

Both kernels work in blocks, read the cache in place, and have gradients. Shape letters: pop/models/layers.py; N is the
number of keys.
"""

import math

import torch
import torch.nn.functional as F

from pop.backends.decode_attention import decode_attention
from pop.engine import attention as engine
from pop.engine.attention import UNBOUNDED, AttentionMetadata
from pop.models import layers

aten = torch.ops.aten
# Private operators of torch, which only `_flash` and `_efficient` call. In torch 2.6 and 2.13, these are their first
# arguments. If another version has others, the choice is left to torch.
ARGUMENTS = {
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask "
    "scale window_size_left window_size_right",
    "_efficient_attention_forward": "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p custom_mask_type compute_log_sumexp scale seqlen_k window_size",
}


def has_arguments(operator: str, names: str) -> bool:
    if not hasattr(aten, operator):
        return False
    arguments = getattr(aten, operator).default._schema.arguments
    return " ".join(argument.name for argument in arguments).startswith(names)


HAS_KERNELS = torch.version.cuda is not None and all(has_arguments(*item) for item in ARGUMENTS.items())
WIDEST, WIDEST_TRAINED = 256, 192  # heads of flash attention; its gradients exceed the shared memory of some GPUs
ALIGNMENT = 8  # numbers in a load of 16 bytes: heads, and rows of a mask, are multiples of them
QUERY_BLOCK = 1024  # tokens; their mask is in memory as numbers that are added to the scores


def cache_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: AttentionMetadata, scale: float
) -> torch.Tensor:
    """Like pop.engine.attention.cache_attention."""
    if not is_supported(q):
        return engine.cache_attention(q, keys, values, at, scale)
    if at.held is None:
        return decode_attention(q, keys, values, at.spans, scale)
    return chunk_attention(q, *engine.read(keys, values, at), at.held, at.spans, at.band, scale)


@torch.library.custom_op("pop::cuda_chunk_attention", mutates_args=())
def chunk_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: torch.Tensor, spans: torch.Tensor, band: torch.Tensor,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """Like pop.engine.attention.chunk_attention. Without a mask, if the spans are a band of the keys.

    It is a custom operator because compiled code must not depend on the numbers in a band.
    """
    T, (own, before, after, is_exact) = q.shape[1], band.tolist()
    if is_exact:
        seen = slice(max(0, own - before), own + T)
        before = before if T > 1 else UNBOUNDED  # one token attends all of these
        return fused_attention(q, k[:, seen], v[:, seen], scale, before=before).flatten(2)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        seen = slice(max(0, own + begin - before), own + end + after)
        mask = engine.span_mask(held[:, seen], spans[:, begin:end])
        out[:, begin:end] = fused_attention(q[:, begin:end], k[:, seen], v[:, seen], scale, mask=mask)
    return out.flatten(2)


chunk_attention.register_fake(lambda q, *_: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]))


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None,
    last_attended: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Like pop.models.layers.causal_attention."""
    if not is_supported(q):
        return layers.causal_attention(q, k, v, scale, window, last_attended)
    T = q.shape[1]
    before = UNBOUNDED if window is None or window >= T else window - 1
    if last_attended is None and (before == UNBOUNDED or has_flash(q)):
        return fused_attention(q, k, v, scale, before=before).flatten(2)
    # The window is in the mask, since the gradients of the memory-efficient kernel ignore its own windows.
    return fused_attention(q, k, v, scale, mask=layers.causal_mask(T, window, last_attended, q.device)).flatten(2)


def vision_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Like F.scaled_dot_product_attention(q, k, v) in a vision tower: each [N, H, P, E]."""
    if not is_supported(q):
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [N, P, H, E]
    return fused_attention(q, k, v, q.shape[-1] ** -0.5, causal=False).transpose(1, 2)


def is_supported(q: torch.Tensor) -> bool:
    """Whether one of the kernels takes q. Those for bfloat16 need sm_80."""
    if not (HAS_KERNELS and q.is_cuda):
        return False
    return q.dtype in (torch.float16, torch.float32) or (q.dtype == torch.bfloat16 and _is_recent(q))


def has_flash(q: torch.Tensor) -> bool:
    """Whether flash attention takes q [B, T, H, E]."""
    widest = WIDEST_TRAINED if torch.is_grad_enabled() else WIDEST
    return q.dtype.itemsize == 2 and q.shape[-1] <= widest and _is_recent(q)


def _is_recent(q: torch.Tensor) -> bool:
    return torch.cuda.get_device_properties(q.device).major >= 8


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
    *, causal: bool = True, before: int = UNBOUNDED, mask: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """q [B, T, H, E] attends k and v [B, N, K, E] -> [B, T, H, E].

    Args:
        causal: Each token attends its own key and those before it. The last token's own key is the last one.
        before: If causal, how many keys before its own a token attends at most.
        mask: [B or 1, T, N] bool, true where a token attends a key. It replaces `causal` and `before`.
    """
    E = q.shape[-1]
    if E % ALIGNMENT:
        q, k, v = (F.pad(x, (0, -E % ALIGNMENT)) for x in (q, k, v))
    if mask is None and has_flash(q):
        out = _flash(q, k, v, scale, causal, before)
    else:
        out = _by_groups(q, k, v, scale, causal and mask is None, before, mask)
    return out[..., :E]


def _by_groups(q, k, v, scale, causal, before, mask) -> torch.Tensor:
    """The memory-efficient kernel knows no groups of query heads, so it runs G times."""
    (B, T), (N, K), bias = q.shape[:2], k.shape[1:3], None
    q = q.unflatten(2, (K, -1))  # [B, T, K, G, E]
    if T == 1:  # the G query heads take the place of the tokens
        q, causal = q.transpose(1, 3), False  # [B, G, K, 1, E]
    if mask is not None:
        bias = q.new_full((*mask.shape[:2], N + -N % ALIGNMENT), -math.inf)[..., :N].masked_fill_(mask, 0)
        bias = bias[:, None].expand(B, K, q.shape[1], N)
    out = torch.stack([_efficient(heads, k, v, scale, causal, before, bias) for heads in q.unbind(3)], dim=3)
    return (out.transpose(1, 3) if T == 1 else out).flatten(2, 3)


def _flash(q, k, v, scale, causal, before) -> torch.Tensor:
    left, right = (None, None) if before == UNBOUNDED else (before, 0)
    options = {"scale": scale, "window_size_left": left, "window_size_right": right}
    T, N = q.shape[1], k.shape[1]
    return aten._flash_attention_forward(q, k, v, None, None, T, N, 0.0, causal, False, **options)[0]


def _efficient(q, k, v, scale, causal, before, bias) -> torch.Tensor:
    kind = 2 if causal else 0  # 2 aligns queries and keys at the end
    window = before + 1 if causal and before < UNBOUNDED else None
    options = {"scale": scale, "window_size": window}
    gradients = torch.is_grad_enabled()
    return aten._efficient_attention_forward(q, k, v, bias, *[None] * 4, 0.0, kind, gradients, **options)[0]
