"""CPUs: faster matrix products, faster attention, and memory that is reused.

`accelerate` gives the linear layers of a finished module a faster `forward`. `attend_cache` replaces the function of
the same name in pop/engine/attention.py, `causal_attention` that of the plain pass, and `attention` that of vision
towers. The results are those of PyTorch's own operators, up to rounding. README.md in this folder says in which cases
the general product is slow.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from pop.engine import attention as engine
from pop.engine.attention import UNBOUNDED, AttentionMetadata
from pop.models import layers

# Dtypes without fast products: float16 on all CPUs, and bfloat16 on those that have no more than AVX2.
WIDENED = {torch.float16} | ({torch.bfloat16} if torch.backends.cpu.get_cpu_capability() == "AVX2" else set())
WIDENED_AT_ONCE = 2**26  # weights that are copied to float32 at a time
STREAMS = 2  # blocks of a matrix that a core reads at once; one or four are up to a tenth slower
# Dtypes with fast products that torch's attention does not use. It uses those of AMX.
_bf16, _amx = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
MULTIPLIED = {torch.bfloat16} if _bf16 and not _amx else set()
QUERY_BLOCK, SCORES_AT_ONCE = 128, 2**20  # tokens, and numbers, which bound how many heads run together
FEWEST_QUERIES, FEWEST_SCORES = 32, 2**15  # of a head; with fewer, calls would take longer than torch's attention
TEMPORARY = 31 * 2**20  # bytes; glibc adapts to freed blocks of at most 32 MiB, headers included


class Linear(nn.Linear):
    """nn.Linear with the fastest product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(layers.Embedding):
    """An embedding whose tied head uses the fastest product."""

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Like F.linear. x is [B, T, in], or [B, in] and [in] for one token a row."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    one_token = x.dim() < 3 or x.shape[-2] == 1
    if not one_token and x.dtype in WIDENED:
        blocks = weight.split(max(1, WIDENED_AT_ONCE // weight.shape[1]))  # an output head is too large to copy whole
        out = torch.cat([F.linear(x.float(), block.float()) for block in blocks], dim=-1)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    if not one_token or x.dtype == torch.float16:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # [B, in]
    if rows.shape[0] > 1:
        out = (weight @ rows.T).T.contiguous()  # [B, out]
    elif torch.compiler.is_compiling() and (parts := _parts(weight.shape[1])):
        out = torch.cat([_fused_product(w, rows[0], parts) for w in weight.chunk(STREAMS)]).to(x.dtype)[None]
    else:
        out = F.linear(rows, weight)
    out = out if bias is None else out + bias
    return out.reshape(*x.shape[:-1], -1)


def _parts(length: int) -> int | None:
    """How many equal parts of at most 4096 numbers a sum has: longer ones compile to slower code. None: over 32."""
    return ([parts for parts in range(1, 33) if length % parts == 0 and length // parts <= 4096] or [None])[0]


def _fused_product(weight: torch.Tensor, x: torch.Tensor, parts: int) -> torch.Tensor:
    """weight [out, in] times x [in] -> [out] float32, each sum in `parts` parts, which the compiler fuses."""
    if parts == 1:  # a second sum, even of one number, would need a buffer
        return (weight * x).sum(-1, dtype=torch.float32)
    return (weight * x).unflatten(-1, (parts, -1)).sum(-1, dtype=torch.float32).sum(-1)


def attend_cache(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: AttentionMetadata, scale: float
) -> torch.Tensor:
    """Like pop.engine.attention.attend_cache. When compiled, one token a row reads K and V once, in place."""
    if q.device.type == "cpu" and q.shape[1] == 1 and at.held is not None and torch.compiler.is_compiling():
        k, v = engine.read(keys, values, at)
        return one_token_attention(q, k, v, engine.attended(at.held, at.spans), scale)
    if q.shape[1] == 1 or q.device.type != "cpu" or q.dtype not in MULTIPLIED:
        return engine.attend_cache(q, keys, values, at, scale)
    k, v = engine.read(keys, values, at)
    return attention_by_products(q, k, v, at.held, at.spans, at.band, scale)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None,
    last_attended: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Like pop.models.layers.causal_attention."""
    if last_attended is not None or not _is_multiplied(q, k, v):
        return layers.causal_attention(q, k, v, scale, window, last_attended)
    band = None if window is None else torch.tensor((0, window - 1, 0, 1), device="cpu")
    return attention_by_products(q, k, v, None, None, band, scale)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Like F.scaled_dot_product_attention(q, k, v) in a vision tower: each [N, H, P, E]."""
    if not _is_multiplied(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v, everything = *(x.transpose(1, 2) for x in (q, k, v)), torch.tensor((0, UNBOUNDED, UNBOUNDED, 1))
    return attention_by_products(q, k, v, None, None, everything, q.shape[-1] ** -0.5).view(q.shape).transpose(1, 2)


def _is_multiplied(*inputs: torch.Tensor) -> bool:
    """Whether attention_by_products is faster than torch's attention, and no gradients are wanted, which it lacks."""
    q = inputs[0]
    return q.device.type == "cpu" and q.dtype in MULTIPLIED and not any(x.requires_grad for x in inputs)


@torch.library.custom_op("pop::attention_by_products", mutates_args=())
def attention_by_products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: torch.Tensor | None, spans: torch.Tensor | None,
    band: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Like pop.engine.attention.attention_by_blocks, by two products for a block. Without a band, it is causal.

    Scores have the dtype of q. The softmax is float32 inside. Only a band that is not exact needs `held` and `spans`.
    """
    (B, T, H, E), (N, K) = q.shape, k.shape[1:3]
    is_small = T < FEWEST_QUERIES or T * N < FEWEST_SCORES
    if is_small and band is None:
        return layers.causal_attention(q, k, v, scale, None)
    if is_small and held is not None:
        return engine.attention_by_blocks(q, k, v, held, spans, band, scale)
    own, before, after, is_exact = (0, UNBOUNDED, 0, 1) if band is None else band.tolist()
    out = q.new_empty(B, T, K, H // K, E)
    q = (q * scale).view(out.shape).transpose(1, 2).contiguous()  # [B, K, T, G, E]
    # Contiguous, since products of strided matrices are up to a third slower: [B, K, E, N] and [B, K, N, E]
    k, v = k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        first, stop = max(0, own + begin - before), min(N, own + end + after)
        if is_exact:  # the whole block attends the keys from `left` to `right`, so only the edges need a mask
            left, right = max(first, own + end - 1 - before), min(stop, own + begin + after + 1)
            edges = [edge for edge in ((first, left), (right, stop)) if edge[0] < edge[1]]
            offsets = [(edge[0] - own - begin, edge[1] - own - begin) for edge in edges]
            biases = [_band_bias(end - begin, *offset, before, after, q.dtype).expand(B, -1, -1) for offset in offsets]
        else:
            edges, biases = [(first, stop)], [_bias(engine.attended(held[:, first:stop], spans[:, begin:end]), q.dtype)]
        at_once = max(1, SCORES_AT_ONCE // ((end - begin) * H // K * (stop - first)))
        step = math.ceil(K / math.ceil(K / at_once))  # heads, as evenly as possible
        for row, head in itertools.product(range(B), range(0, K, step)):
            heads = slice(head, head + step)
            x = q[row, heads, begin:end]  # [heads, t, G, E]
            scores = torch.bmm(x.flatten(1, 2), k[row, heads, :, first:stop])  # [heads, t * G, keys]
            for edge, bias in zip(edges, biases, strict=True):
                scores.unflatten(1, x.shape[1:3])[..., edge[0] - first : edge[1] - first] += bias[row, :, None]
            attended = torch.bmm(scores.softmax(-1), v[row, heads, first:stop])  # [heads, t * G, E]
            out[row, begin:end, heads] = attended.view(x.shape).transpose(0, 1)
    return out.flatten(2)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(mask, 0.0, -math.inf).to(dtype)


@functools.lru_cache(64)  # all layers and most blocks have the same
def _band_bias(T: int, first: int, stop: int, before: int, after: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to the scores [T, keys] of keys from `first` to `stop`, counted from the first query's own key."""
    own, key = torch.arange(T, device="cpu")[:, None], torch.arange(first, stop, device="cpu")
    return _bias((own - before <= key) & (key <= own + after), dtype)


attention_by_products.register_fake(lambda q, *_: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]))


def one_token_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """masked_attention for T = 1 as multiply-and-sum: q [B, 1, H, E], k and v [B, N, K, E] -> [B, 1, H * E]."""
    (B, N, K, E), dtype = k.shape, v.dtype
    k, v = (x.transpose(1, 2).float() for x in (k, v))  # [B, K, N, E]
    q = q.view(B, K, -1, 1, E).float() * scale  # [B, K, G, 1, E]
    groups = range(q.shape[2])
    scores = torch.stack([(q[:, :, g] * k).sum(-1) for g in groups])  # [G, B, K, N]
    scores = scores.masked_fill(~mask.view(B, 1, N), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1)[..., None]  # [G, B, K, 1]
    out = torch.stack([(weights[g, ..., None] * v).sum(-2) / total[g] for g in groups], dim=2)  # [B, K, G, E]
    return out.reshape(B, 1, -1).to(dtype)


def keep_freed_memory() -> None:
    """Raise glibc's mmap threshold, so that activation buffers are reused.

    By default they are unmapped after every layer, and zeroed by the system for the next one. That took a quarter of
    SmolLM2's prefill. glibc raises the threshold (mallopt(3), M_MMAP_THRESHOLD) to the largest block that it has seen
    freed. So this allocates one block and frees it untouched. Other allocators are not affected.
    """
    torch.empty(TEMPORARY, dtype=torch.uint8, device="cpu")  # whatever the default device is
