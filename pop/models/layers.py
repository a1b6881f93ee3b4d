"""What the model families truly share: normalisation, rotary positions, attention.

Shape letters, here and in the rest of `pop`:

    B batch rows      T tokens of a call   S cache slots       L layers
    D model width     H query heads        K key-value heads   G = H / K query heads that share a key-value head
    E head width      V vocabulary         W full-depth rows of a pruned layer
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from pop.models.config import RopeConfig

Rope = tuple[torch.Tensor, torch.Tensor]  # cos, sin of the pairs: each [B, T, 1, E/2] float32
Ropes = dict[int | None, Rope]  # by the window of the layers that they are for; None: of those without one

# What CPUs have no fast products of: float16, and, those with AVX2 alone, bfloat16. GPUs have both.
WIDENED = {torch.float16} | ({torch.bfloat16} if torch.backends.cpu.get_cpu_capability() == "AVX2" else set())
WIDENED_AT_ONCE = 2**26  # numbers
STREAMS = 4  # in how many places at once a core reads a matrix with one token: one alone leaves the memory waiting
QUERY_BLOCK = 256  # tokens; fewer waste less on keys that few of them attend, more are faster for each


class Linear(nn.Linear):
    """nn.Linear, by whichever product is fastest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding, which may serve as the output head as well (tied)."""

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> logits [..., V]."""
        return linear(x, self.weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [B, T, in], or [B, in] and [in] for one token a row; weight [out, in], bias [out] -> likewise with `out`.

    On a CPU the general product is far from the machine's limit in two cases. With one token a row, as in decode,
    time is what it takes to read the weights, and a plain multiply-and-sum (compiled) or the transposed product reads
    them up to three times faster, but for float16. And where there are no fast products of 16-bit numbers, many tokens
    are worth a copy of the weights in float32.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    one_token = x.dim() < 3 or x.shape[-2] == 1
    if not one_token and x.dtype in WIDENED:
        parts = weight.split(max(1, WIDENED_AT_ONCE // weight.shape[1]))  # an output head is too large to copy whole
        out = torch.cat([F.linear(x.float(), part.float()) for part in parts], dim=-1)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    if not one_token or x.dtype == torch.float16:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # [B, in]
    if rows.shape[0] > 1:
        out = (weight @ rows.T).T.contiguous()  # [B, out]
    elif torch.compiler.is_compiling() and (parts := _parts(rows.shape[1])):
        streams = STREAMS if weight.shape[0] % STREAMS == 0 else 1
        out = torch.cat([_fused_product(part, rows[0], parts) for part in weight.chunk(streams)])  # [out]
        out = out.to(x.dtype)[None]  # [1, out]
    else:
        out = F.linear(rows, weight)
    out = out if bias is None else out + bias
    return out.reshape(*x.shape[:-1], -1)


def _parts(length: int) -> int | None:
    """In how few equal parts to sum so many numbers: a sum of over 4096 is compiled to slower code. None: in none."""
    return next((parts for parts in range(1, 33) if length % parts == 0 and length // parts <= 4096), None)


def _fused_product(weight: torch.Tensor, x: torch.Tensor, parts: int) -> torch.Tensor:
    """weight [out, in], x [in] -> [out] float32, each number summed in so many parts: for the compiler to fuse."""
    if parts == 1:  # a second sum, though of one number, would cost a buffer, and cat a copy of it
        return (weight * x).sum(-1, dtype=torch.float32)
    return (weight * x).unflatten(-1, (parts, -1)).sum(-1, dtype=torch.float32).sum(-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension. The statistics are float32 whatever the weights are."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] / rms(x), without the weight: the same shape and dtype."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] -> the same shape and dtype."""
        return self.weight * self.normalise(x)  # cast first, scale after: so does the reference


def rope_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> torch.Tensor:
    """Angle per position of each rotated pair: [E / 2] float32 (Su et al. 2021, with Llama-3.1's scaling).

    "linear" divides all frequencies by `factor`. "llama3" divides only those whose wavelength is longer than the
    original context (over `low_freq_factor`), keeps those shorter than it over `high_freq_factor`, and blends in
    between.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / rope.base**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        blend = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blend = blend.clamp(0, 1)
        return (1 - blend) * frequencies / rope.factor + blend * frequencies
    return frequencies


def rope_tables(positions: torch.Tensor, frequencies: torch.Tensor) -> Rope:
    """positions [B, T] -> cos, sin, each [B, T, 1, E/2]. Float32: bfloat16 cannot tell position 1000 from 1001."""
    angles = positions[:, :, None, None].float() * frequencies  # [B, T, 1, E/2]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turn each pair (x[i], x[i + E/2]) of x [B, T, heads, E] by its token's angle."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclasses.dataclass(frozen=True)
class Images:
    """What images and videos bring to a batch of prompts, tokens [B, T]: M tokens that stand for what is seen.

    features: [M, D], what these tokens have for embeddings.
    numbers: [B, T] int64, which of the M each token is; -1: it is text.
    ahead: [B, T] int64, how many tokens behind it each one attends as well, up to the last of its image; None: none.
    positions: [3, B, T] int64, the tokens' rotary positions by time, row and column, counted from the prompt's first;
        None: one after the other, as text. What follows the prompt goes on behind the largest of them.
    deepstack: for each of the first layers, [M, D] that is added to h behind it.

    numbers, ahead and positions are on the CPU.
    """

    features: torch.Tensor
    numbers: torch.Tensor
    ahead: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    deepstack: tuple[torch.Tensor, ...] = ()

    def place(self, h: torch.Tensor) -> torch.Tensor:
        """Embeddings h [B, T, D] -> with the features in their places."""
        numbers = self.numbers.to(h.device)
        return torch.where((numbers >= 0)[..., None], self.features[numbers.clamp(min=0)], h)

    def deepen(self, h: torch.Tensor, index: int) -> torch.Tensor:
        """h [B, T, D] behind layer `index` -> with what is added there."""
        if index >= len(self.deepstack):
            return h
        numbers = self.numbers.to(h.device)
        return torch.where((numbers >= 0)[..., None], h + self.deepstack[index][numbers.clamp(min=0)], h)

    def reach(self, positions: torch.Tensor) -> torch.Tensor | None:
        """The tokens' positions [B, T] -> the last that each may attend: its own, or its image's last. None: its own"""
        return None if self.ahead is None else positions + self.ahead.to(positions.device)

    def rotary(self, index: torch.Tensor) -> torch.Tensor:
        """index [B, C], of tokens in their rows -> their rotary positions, [B, C], or [3, B, C] by axis."""
        if self.positions is None:
            return index
        positions = self.positions.to(index.device)
        return positions.gather(2, index.clamp(max=positions.shape[2] - 1).expand(3, -1, -1))

    def shift(self, lengths: torch.Tensor) -> torch.Tensor:
        """By how much the rotary position behind each prompt of `lengths` [B] differs from its length: [B]."""
        if self.positions is None:
            return torch.zeros_like(lengths)
        inside = torch.arange(self.positions.shape[2]) < lengths[:, None]  # [B, T]
        return self.positions.where(inside, -1).amax((0, 2)) + 1 - lengths

    def extended(self, num_tokens: int) -> Images:
        """The same with text behind the prompts, which have T tokens each: `num_tokens` a row."""
        B, T = self.numbers.shape
        more = num_tokens - T
        lengths = torch.full((B,), T)
        behind = (lengths + self.shift(lengths))[:, None] + torch.arange(more)  # [B, more]
        return dataclasses.replace(
            self,
            numbers=F.pad(self.numbers, (0, more), value=-1),
            ahead=None if self.ahead is None else F.pad(self.ahead, (0, more)),
            positions=None if self.positions is None else torch.cat((self.positions, behind.expand(3, -1, -1)), dim=2),
        )

    def whole(self, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """begin, end [B], of chunks of the rows -> ends [B] at or before `end` behind which no token is attended."""
        if self.ahead is None:
            return end
        index = torch.arange(self.ahead.shape[1])
        ends = (self.ahead == 0) & (index < end[:, None])  # [B, T], whether a chunk may end behind this token
        return torch.where(ends, index + 1, begin[:, None]).amax(1)

    def of(self, index: torch.Tensor, valid: torch.Tensor) -> Images | None:
        """What is of images among some tokens, index [B, C] in their rows, valid [B, C]; None: they are all text."""
        index = index.clamp(max=self.numbers.shape[1] - 1)
        numbers = self.numbers.gather(1, index).where(valid, -1)
        if not (numbers >= 0).any():
            return None
        ahead = None if self.ahead is None else self.ahead.gather(1, index).where(valid, 0)
        positions = None if self.positions is None else self.rotary(index)
        return dataclasses.replace(self, numbers=numbers, ahead=ahead, positions=positions)


def visible(
    positions: torch.Tensor, filled: int, window: int | None, reach: torch.Tensor | None = None
) -> torch.Tensor:
    """Which of the positions 0 to filled - 1 tokens at `positions` [B, T] attend: [B, T, filled] bool.

    A token attends itself and all before it, or, with a window, the window - 1 tokens before it. reach: [B, T], up to
    which position instead of its own, see Images.
    """
    attended, positions = torch.arange(filled, device=positions.device), positions[..., None]
    mask = attended <= (positions if reach is None else reach[..., None])  # [B, T, filled]
    return mask if window is None else mask & (attended > positions - window)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    reach: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token attends itself and what its layer's window shows of what is before it, and what `reach` adds.

    q [B, T, H, E], k and v [B, T, K, E] -> [B, T, H * E]. reach: as in `visible`.
    """
    T = q.shape[1]
    if reach is not None or (window is not None and window < T):
        mask = visible(torch.arange(T, device=q.device)[None], T, window, reach)  # [1, T, T], or [B, T, T]
        return masked_attention(q, k, v, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads before tokens
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [B, T, H, E] attends the slots of k and v [B, S, K, E] where mask [B, T, S] is true -> [B, T, H * E]."""
    B, T, H, E = q.shape
    if T == 1 and q.device.type == "cpu" and torch.compiler.is_compiling():
        return _one_token_attention(q, k, v, mask, scale)
    k, v, mask = k.transpose(1, 2), v.transpose(1, 2), mask[:, None]  # [B, K, S, E] and [B, 1, T, S]
    if T == 1:
        # The G query heads of a group take the place of the tokens: no copy of K and V a query head.
        q = q.view(B, k.shape[1], -1, E)  # [B, K, G, E]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(B, 1, H * E)
    q = q.transpose(1, 2)  # [B, H, T, E]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


@torch.library.custom_op("pop::attention_by_blocks", mutates_args=())
def attention_by_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, span: torch.Tensor, scale: float
) -> torch.Tensor:
    """masked_attention of T consecutive tokens, QUERY_BLOCK at a time and each time over what these may attend alone.

    span: [3] int64 on the CPU: which of the S keys the first token's own is, and how many keys before and behind its
    own any token attends at most. So tokens with a window cost T * (window + QUERY_BLOCK), whatever S is. To the
    compiler this is one operation, with as many steps as it takes: no length is ever compiled in.
    """
    B, T, H, E = q.shape
    own, before, behind = span.tolist()
    out = q.new_empty(B, T, H * E)
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        keys = slice(max(0, own + begin - before), own + end + behind)
        out[:, begin:end] = masked_attention(q[:, begin:end], k[:, keys], v[:, keys], mask[:, begin:end, keys], scale)
    return out


@attention_by_blocks.register_fake
def _(q, k, v, mask, span, scale):
    B, T, H, E = q.shape
    return q.new_empty(B, T, H * E)


def _one_token_attention(q, k, v, mask, scale):
    """masked_attention for T = 1, written out: compiled, it reads K and V once, in their place and in their dtype."""
    (B, S, K, E), dtype = k.shape, v.dtype
    k, v = (x.transpose(1, 2).float() for x in (k, v))  # [B, K, S, E]
    q = q.view(B, K, -1, 1, E).float() * scale  # [B, K, G, 1, E]
    groups = range(q.shape[2])
    scores = torch.stack([(q[:, :, g] * k).sum(-1) for g in groups])  # [G, B, K, S]
    scores = scores.masked_fill(~mask.view(B, 1, S), -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1)[..., None]  # [G, B, K, 1]
    out = torch.stack([(weights[g, ..., None] * v).sum(-2) / total[g] for g in groups], dim=2)  # [B, K, G, E]
    return out.reshape(B, 1, -1).to(dtype)
