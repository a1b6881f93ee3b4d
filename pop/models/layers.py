"""The parts that all families share: norms, rotary positions, attention, MLPs. Plain PyTorch, written to be read.

pop/backends has faster forms of some parts. Attribute names are the checkpoint's names.

In text, K and V are keys and values. In shapes and products they are numbers, as all of these letters are, here and in
the rest of `pop`:

    B batch rows      T tokens of a call   S cache slots       L layers
    D model width     H query heads        K key-value heads   G = H / K query heads that share a key-value head
    E head width      V vocabulary         C tokens of a batch row in a chunk
    R size of a code  N keys, or tokens    W full-depth tokens of a chunk
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop.models.config import RopeConfig

Rope = tuple[Tensor, ...]  # what a layer needs of its tokens' positions: cos and sin, each [B, T, 1, E/2] float32
Ropes = dict[int | None, Rope]  # by the layers' window; None: layers without a window
KeysValues = tuple[Tensor, Tensor]  # K and V of some tokens in one layer


class Embedding(nn.Embedding):
    """nn.Embedding that can also serve as the output head (tied)."""

    def unembed(self, x: Tensor) -> Tensor:
        """x [..., D] -> logits [..., V]."""
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019). Statistics are float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def mean_square(self, x: Tensor) -> Tensor:
        """x [..., dim] float32 -> [..., 1]."""
        return x.pow(2).mean(-1, keepdim=True)

    def normalise(self, x: Tensor) -> Tensor:
        """x [..., dim] / rms(x), without the weight: the same shape and dtype."""
        x32 = x.float()
        return (x32 * torch.rsqrt(self.mean_square(x32) + self.eps)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> the same shape and dtype."""
        return self.weight * self.normalise(x)  # rounded before and after, as in transformers


class GemmaRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), all in float32."""

    def forward(self, x):
        return (self.normalise(x.float()) * (1 + self.weight.float())).to(x.dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int, device: torch.device) -> Tensor:
    """The angle per position of each rotated pair: [E/2] float32 (Su et al. 2021, with Llama-3.1's scaling).

    "linear" divides all frequencies by `factor`. "llama3" decides by wavelength. With a context of M original tokens,
    it divides frequencies whose wavelength is above M / low_freq_factor. It keeps those whose wavelength is below
    M / high_freq_factor, and blends the rest.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / rope.base**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = rope.original_max_positions / wavelengths  # in the original context
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequencies / rope.factor + kept * frequencies
    return frequencies


def rope_tables(positions: Tensor, frequencies: Tensor) -> Rope:
    """positions [B, T, 1], or [B, T, E/2] of each pair -> cos and sin, each [B, T, 1, E/2].

    Float32: bfloat16 cannot tell position 1000 from 1001.
    """
    angles = positions[:, :, None].float() * frequencies  # [B, T, 1, E/2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of x [B, T, heads, E] by its token's angle."""
    cos, sin = rope
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)  # [B, T, heads, E/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """The four projections of grouped-query attention (Ainslie et al. 2023). `causal_attention` does the attending.

    Args:
        config: of any family.
        norm: the class of the norm that a family applies to each head of q and k before it rotates them.
    """

    def __init__(self, config, norm: type[nn.Module] = nn.Identity):
        super().__init__()
        D = config.hidden_size
        E = config.head_dim
        bias = config.attention_bias
        self.head_dim = E
        self.q_proj = nn.Linear(D, config.num_heads * E, bias=bias)
        self.k_proj = nn.Linear(D, config.num_kv_heads * E, bias=bias)
        self.v_proj = nn.Linear(D, config.num_kv_heads * E, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * E, D, bias=bias)
        self.q_norm = norm(E, config.norm_eps)
        self.k_norm = norm(E, config.norm_eps)

    def heads(self, x: Tensor) -> Tensor:
        """Projected x [B, T, heads * E] -> [B, T, heads, E]."""
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = config.intermediate_size
        bias = config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, last_attended: Tensor | None = None
) -> Tensor:
    """Attention over the tokens themselves: q [B, T, H, E], k and v [B, T, K, E] -> [B, T, H * E].

    Args:
        scale: multiplies q k^T.
        window: how many tokens a token attends to, itself included. None: itself and all tokens before it.
        last_attended: [B, T] int, the last position that each token attends to. None: the token's own position.
    """
    T = q.shape[1]
    mask = None
    if last_attended is not None or (window is not None and window < T):
        mask = causal_mask(T, window, last_attended, q.device)
    return masked_attention(q, k, v, mask, scale)


def causal_mask(T: int, window: int | None, last_attended: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens each token attends to, as in `causal_attention`: [1, T, T] bool, or [B, T, T] with last_attended."""
    key = torch.arange(T, device=device)
    query = key[None, :, None]  # [1, T, 1]
    last = query if last_attended is None else last_attended[..., None]  # [1 or B, T, 1]
    mask = key <= last
    if window is None:
        return mask
    return mask & (key > query - window)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [B, T, H, E] attends to the keys of k and v [B, N, K, E] where mask [B, T, N] is true -> [B, T, H * E].

    Without a mask, each of the T = N tokens attends to itself and those before it.
    """
    B, T, H, E = q.shape
    k = k.transpose(1, 2)  # [B, K, N, E]
    v = v.transpose(1, 2)  # [B, K, N, E]
    if mask is not None:
        mask = mask[:, None]  # [B, 1, T, N]
        if T == 1:
            # The G query heads that share a key head take the place of the tokens, so K and V are not repeated.
            q = q.view(B, k.shape[1], -1, E)  # [B, K, G, E]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(B, 1, H * E)
    q = q.transpose(1, 2)  # [B, H, T, E]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)
