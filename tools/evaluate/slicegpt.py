"""SliceGPT (Ashkboos et al. 2024): hidden states in a basis of their principal components, without the smallest.

A weightless RMSNorm commutes with rotations. So once the norms' weights are folded into the projections after them,
the residual stream may be held in any orthonormal basis Q. Attention and MLP are a block each. The basis of a block's
input holds its principal components on calibration text, without the last ones. Between two blocks, the shortcut
carries h from one basis to the next: h Q_1' Q_2. As in the authors' code, the output of the last block is not cut, so
the final norm and the head stay as they are. The norms divide by the full D. Shape letters: pop/models/layers.py.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

import pop
from pop.errors import InputError, UnsupportedError
from pop.models.base import PrunableLayer, PrunableModel
from tools.evaluate.baselines import shared_copy
from tools.evaluate.contender import Contender
from tools.evaluate.passes import attend_prompt, embed


@dataclasses.dataclass
class Sliced(Contender):
    """A sliced model, read at full depth."""

    def flops(self, num_tokens: int) -> None:
        return None  # pop/pruning/cost.py counts layers, not widths


def slicegpt(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """Cut floor(D * fraction) of the D components of every hidden state, by their size on the calibration `windows`."""
    if model.config.family != "llama":
        raise UnsupportedError(f"slicegpt is written for the llama family, not {model.config.family}; leave it out")
    if not 0 <= fraction < 1:
        raise InputError(f"slicegpt's fraction is {fraction}; it is the share of components to cut, 0 or more, below 1")
    D = model.config.hidden_size
    width = D - math.floor(D * fraction + 1e-9)
    module = SlicedModule(model.module, principal_bases(model, width, windows))
    module.config = dataclasses.replace(model.config, hidden_size=width)
    sliced = pop.Model(module, module.config, model.tokenizer, plan=None, max_seq_len=model.max_seq_len)
    return Sliced("slicegpt", sliced, pop.PrunePlan.none())


@torch.no_grad()
def principal_bases(model: pop.Model, width: int, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The bases of all blocks: Q [D, width] of each of the 2 L inputs, and the identity [D, D] of the last output.

    They are fitted in order. Each basis is fitted to the states that remain after the cuts before it.
    """
    module = model.module
    bases = []
    states = []
    ropes = []
    for window in windows:
        h, rope = embed(module, window)
        states.append(h)
        ropes.append(rope)
    for layer in module.layers:
        states = _cut(states, width, bases)
        for index, (h, rope) in enumerate(zip(states, ropes, strict=True)):
            attended = attend_prompt(layer, *layer.queries_keys_values(h, rope[layer.window]))
            states[index] = h + layer.attention_update(attended)
        states = _cut(states, width, bases)
        states = [h + layer.mlp_update(h) for h in states]
    return [*bases, torch.eye(model.config.hidden_size, device=model.device)]


def _cut(states: list[torch.Tensor], width: int, bases: list[torch.Tensor]) -> list[torch.Tensor]:
    """Append the first `width` principal components of the states to `bases`. Returns the projected states."""
    normalised = torch.cat([F.normalize(h[0].double(), dim=-1) for h in states])  # [N, D]
    _, vectors = torch.linalg.eigh(normalised.T @ normalised)  # ascending
    basis = vectors.flip(1)[:, :width].float()
    bases.append(basis)
    return [(h.float() @ basis @ basis.T).to(h.dtype) for h in states]


class SlicedModule(PrunableModel):
    """A Llama whose layers hold h [B, T, width], each in its own bases."""

    def __init__(self, dense: nn.Module, bases: list[torch.Tensor]):
        super().__init__()
        self.dense = dense  # its rotary tables, final norm and head are used as they are
        table = dense.model.embed_tokens.weight
        self.table = _frozen(table.float() @ bases[0], table.dtype)  # [V, width]
        self.sliced = nn.ModuleList()
        for index, layer in enumerate(dense.layers):
            enter, middle, leave = bases[2 * index : 2 * index + 3]
            self.sliced.append(SlicedLayer(layer, enter, middle, leave))

    @property
    def layers(self) -> nn.ModuleList:
        return self.sliced

    def rope(self, positions):
        return self.dense.rope(positions)

    def head(self, h):
        return self.dense.head(h)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.table)


class SlicedLayer(PrunableLayer):
    """A layer that reads h in one basis, holds it in a second between attention and MLP, and leaves it in a third."""

    def __init__(self, layer: nn.Module, enter: torch.Tensor, middle: torch.Tensor, leave: torch.Tensor):
        super().__init__()
        self.layer = shared_copy(layer)
        self.scale = layer.scale
        self.window = layer.window
        attention = self.layer.self_attn
        mlp = self.layer.mlp
        dtype = layer.self_attn.q_proj.weight.dtype
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, _reading(getattr(attention, name), layer.input_layernorm.weight, enter))
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, _reading(getattr(mlp, name), layer.post_attention_layernorm.weight, middle))
        attention.o_proj = _writing(attention.o_proj, middle)
        mlp.down_proj = _writing(mlp.down_proj, leave)
        D = len(enter)
        self.layer.input_layernorm = SlicedNorm(D, layer.input_layernorm.eps)
        self.layer.post_attention_layernorm = SlicedNorm(D, layer.post_attention_layernorm.eps)
        self.attention_shortcut = _frozen(enter.T @ middle, dtype)
        self.mlp_shortcut = _frozen(middle.T @ leave, dtype)

    def queries_keys_values(self, h, rope):
        return self.layer.queries_keys_values(h, rope)

    def attention_update(self, attended):
        return self.layer.attention_update(attended)

    def mlp_update(self, h):
        return self.layer.mlp_update(h)

    def forward(self, h, rope, attend):
        attended = attend(self, *self.queries_keys_values(h, rope))
        h = h @ self.attention_shortcut + self.attention_update(attended)
        return h @ self.mlp_shortcut + self.mlp_update(h)


class SlicedNorm(nn.Module):
    """A weightless RMSNorm of the components that remain of D. The mean of squares is over all D of them."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        mean_square = x32.pow(2).sum(-1, keepdim=True) / self.width
        return (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


def _reading(linear: nn.Linear, norm: torch.Tensor, basis: torch.Tensor) -> nn.Linear:
    """W diag(norm) Q: reads x / rms(x) in the basis Q."""
    return _linear((linear.weight.float() * norm.float()) @ basis, linear.bias, linear.weight.dtype)


def _writing(linear: nn.Linear, basis: torch.Tensor) -> nn.Linear:
    """Q' W, and Q' b: writes in the basis Q."""
    bias = None if linear.bias is None else linear.bias.float() @ basis
    return _linear(basis.T @ linear.weight.float(), bias, linear.weight.dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _frozen(weight, dtype)
    if bias is not None:
        linear.bias = _frozen(bias, dtype)
    return linear


def _frozen(values: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.detach().to(dtype), requires_grad=False)
