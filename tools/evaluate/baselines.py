"""What prefill-only pruning is compared with: other methods that make a model cheaper, and POP with a part taken out.

    shortgpt         layers of the least block influence removed from both stages (Men et al. 2024)
    deepest-dropped  the deepest layers removed from both stages
    slicegpt         hidden states rotated onto principal components, the least of them cut (Ashkboos et al. 2024)
    no-kv            POP without its K/V projections: in pruned layers decode sees no prompt token but the last one
    no-boundary      POP without its boundary handling: the last prompt token is pruned like all others

All are *contenders*: they fill a KV cache from a prompt and extend it token by token, and tools/evaluate/__main__.py treats
them and POP's own plans alike. They are here to be compared with, and written to be read. Shape letters:
pop/models/layers.py.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

import pop
from pop import engine
from pop.engine.cache import write
from pop.errors import InputError, UnsupportedError
from pop.models.layers import causal_attention, masked_attention
from pop.pruning.cost import prefill_flops


@dataclasses.dataclass
class Contender:
    """A model and how it reads a prompt: here, by a pruning plan.

    name: its row in a table. model: a pop.Model. plan: a pop.PrunePlan; PrunePlan.none() reads at full depth.
    """

    name: str
    model: pop.Model
    plan: pop.PrunePlan

    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        """Fill an empty cache of one row with a prompt. Returns logits [V] of the first new token."""
        return self.model.prefill([tokens], cache, plan=self.plan)[0]

    def extend(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        """Append tokens [T] as decode would, one after the other. Returns logits [T, V] of what follows each."""
        return engine.extend(self.model.module, torch.tensor([tokens], device=self.model.device), cache)[0]

    def flops(self, num_tokens: int) -> int | None:
        """What prefill costs by the model's shapes; None where pop/pruning/cost.py does not know."""
        return prefill_flops(self.model.config, num_tokens, self.plan)

    def logits(self, prompt: list[int], continuation: list[int]) -> torch.Tensor:
        """Prefill `prompt`, then force `continuation` [C] on the model: logits [C, V] that predict its tokens."""
        cache = self.model.new_cache(1, len(prompt) + len(continuation) - 1)
        logits = self.prefill(prompt, cache)[None]
        return torch.cat((logits, self.extend(continuation[:-1], cache))) if len(continuation) > 1 else logits

    def generate(self, prompt: list[int], count: int, until: Callable[[list[int]], bool] | None = None) -> list[int]:
        """The greedy continuation by at most `count` tokens, up to and with an end token, or until `until(tokens)`."""
        tokenizer, ends = self.model.tokenizer, self.model.config.eos_ids
        known = None if tokenizer is None else tokenizer.vocab_size  # an embedding may be padded beyond it
        cache = self.model.new_cache(1, len(prompt) + count - 1)
        logits, tokens = self.prefill(prompt, cache), []
        while True:
            tokens.append(int(logits[:known].argmax()))
            if len(tokens) == count or tokens[-1] in ends or (until and until(tokens)):
                return tokens
            logits = self.extend(tokens[-1:], cache)[0]


# ---- Layers removed from both stages ----


def deepest_dropped(model: pop.Model, fraction: float, windows=None) -> Contender:
    """Remove the deepest floor(L * fraction) layers."""
    layers = pop.PrunePlan.deepest(model.config.num_layers, fraction).layers
    return Contender("deepest-dropped", without_layers(model, layers), pop.PrunePlan.none())


def shortgpt(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """Remove the floor(L * fraction) layers of the least block influence on the calibration `windows`."""
    count = len(pop.PrunePlan.deepest(model.config.num_layers, fraction).layers)
    layers = block_influence(model, windows).argsort(stable=True)[:count].tolist()
    return Contender("shortgpt", without_layers(model, layers), pop.PrunePlan.none())


@torch.no_grad()
def block_influence(model: pop.Model, windows: list[torch.Tensor]) -> torch.Tensor:
    """BI_l = 1 - E[cos(h entering layer l, h leaving it)] over all tokens: [L] (Men et al. 2024, equation 1).

    windows: token ids, each [T], as `calibration_windows` makes them.
    """
    module = model.module
    totals = torch.zeros(len(module.layers), dtype=torch.float64)
    for window in windows:
        h, rope = _embed(module, window)
        for index, layer in enumerate(module.layers):
            before, h = h, _run_layer(layer, h, rope)
            totals[index] += (1 - F.cosine_similarity(before.double(), h.double(), dim=-1)).sum().cpu()
    return totals / sum(map(len, windows))


def without_layers(model: pop.Model, layers: Iterable[int]) -> pop.Model:
    """The same model, sharing its weights, without `layers`. Raises InputError if none would be left."""
    if len(set(layers)) == model.config.num_layers:
        raise InputError("a baseline would remove every layer; give it a smaller fraction")
    module = _shared_copy(model.module)
    for index in sorted(layers, reverse=True):
        del module.layers[index]
    module.config = dataclasses.replace(model.config, num_layers=len(module.layers))
    return pop.Model(module, module.config, model.tokenizer, plan=None, max_seq_len=model.max_seq_len)


# ---- SliceGPT ----


@dataclasses.dataclass
class Sliced(Contender):
    def flops(self, num_tokens: int) -> None:
        return None  # pop/pruning/cost.py counts layers, not widths


def slicegpt(model: pop.Model, fraction: float, windows: list[torch.Tensor]) -> Contender:
    """Cut floor(D * fraction) of the D components of every hidden state (Ashkboos et al. 2024).

    A weightless RMSNorm commutes with rotations, so with the norms' weights folded into the projections behind them
    the residual stream may be held in any orthonormal basis Q. The basis of each block's input (attention and MLP are
    a block each) is that of its principal components on the calibration `windows`, of which the last are left out.
    Between two blocks the shortcut carries h from one basis to the next: h Q_1' Q_2. As in the authors' code, the
    last block's output is not cut, so that final norm and head stay as they are. The norms divide by the full D.
    """
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
    """The bases Q [D, width] of the 2 L blocks' inputs, and the last block's output: [D, D], the identity.

    One after the other: each basis sees the states that the cut made by those before it leaves.
    """
    module, bases = model.module, []
    inputs = [_embed(module, window) for window in windows]
    states, ropes = [h for h, _ in inputs], [rope for _, rope in inputs]
    for layer in module.layers:
        states = _cut(states, width, bases)
        for index, (h, rope) in enumerate(zip(states, ropes, strict=True)):
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            states[index] = h + layer.attention_update(causal_attention(q, k, v, layer.scale, layer.window))
        states = _cut(states, width, bases)
        states = [h + layer.mlp_update(h) for h in states]
    return [*bases, torch.eye(model.config.hidden_size, device=model.device)]


def _cut(states: list[torch.Tensor], width: int, bases: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add to `bases` the first `width` principal components of the normalised states; project the states on them."""
    normalised = torch.cat([F.normalize(h[0].double(), dim=-1) for h in states])  # [N, D]; PCA does not mind the scale
    _, vectors = torch.linalg.eigh(normalised.T @ normalised)  # ascending
    basis = vectors.flip(1)[:, :width].float()
    bases.append(basis)
    return [(h.float() @ basis @ basis.T).to(h.dtype) for h in states]


class SlicedModule(nn.Module):
    """A Llama whose layers hold h [B, T, width] in bases of their own; the interface is that of pop/models."""

    deepstack_layers = 0

    def __init__(self, dense: nn.Module, bases: list[torch.Tensor]):
        super().__init__()
        self.dense = dense  # its rotary tables, final norm and head are used as they are
        table = dense.model.embed_tokens.weight
        self.table = _frozen(table.float() @ bases[0], table.dtype)  # [V, width]
        self.layers = nn.ModuleList(
            SlicedLayer(layer, *bases[2 * index : 2 * index + 3]) for index, layer in enumerate(dense.layers)
        )
        self.rope, self.head = dense.rope, dense.head

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.table)


class SlicedLayer(nn.Module):
    """A layer that reads h in one basis, holds it in a second between attention and MLP, and leaves it in a third."""

    def __init__(self, layer: nn.Module, enter: torch.Tensor, middle: torch.Tensor, leave: torch.Tensor):
        super().__init__()
        self.layer, self.scale, self.window = _shared_copy(layer), layer.scale, layer.window
        attention, mlp, dtype = self.layer.self_attn, self.layer.mlp, layer.self_attn.q_proj.weight.dtype
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, _reading(getattr(attention, name), layer.input_layernorm.weight, enter))
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, _reading(getattr(mlp, name), layer.post_attention_layernorm.weight, middle))
        attention.o_proj, mlp.down_proj = _writing(attention.o_proj, middle), _writing(mlp.down_proj, leave)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.layer.input_layernorm, self.layer.post_attention_layernorm = (SlicedNorm(len(enter), n.eps) for n in norms)
        self.attention_shortcut = _frozen(enter.T @ middle, dtype)
        self.mlp_shortcut = _frozen(middle.T @ leave, dtype)

    def queries_keys_values(self, h, rope):
        return self.layer.queries_keys_values(h, rope)

    def update(self, h: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        h = h @ self.attention_shortcut + self.layer.attention_update(attended)
        return h @ self.mlp_shortcut + self.layer.mlp_update(h)


class SlicedNorm(nn.Module):
    """A weightless RMSNorm of what is left of D components: the mean of squares is over all D of them."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)


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


# ---- POP with a part taken out ----


class NoBoundary(Contender):
    """Every prompt token is pruned, the last one too: the first new token is predicted from its pruned state."""

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        h, rope = _embed(module, torch.tensor(tokens, device=self.model.device))
        slots = torch.arange(len(tokens), device=h.device)[None]  # [1, T]
        for index, layer in enumerate(module.layers):
            if index in self.plan.layers:
                write(*cache.layer(index), slots, *layer.keys_values(h, rope[layer.window]))
            else:
                q, k, v = layer.queries_keys_values(h, rope[layer.window])
                write(*cache.layer(index), slots, k, v)
                h = layer.update(h, causal_attention(q, k, v, layer.scale, layer.window))
        cache.lengths += len(tokens)
        return module.head(h[0, -1])

    def flops(self, num_tokens: int) -> None:
        return None


class NoKV(Contender):
    """In pruned layers only the boundary token leaves K and V: it attends itself, and decode it and what is new."""

    @torch.no_grad()
    def prefill(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module = self.model.module
        everyone, boundary = slice(None), slice(len(tokens) - 1, None)
        h, rope = _embed(module, torch.tensor(tokens, device=self.model.device))
        h = h.clone()
        slots = torch.arange(len(tokens), device=h.device)[None]  # [1, T]
        for index, layer in enumerate(module.layers):
            rows = boundary if index in self.plan.layers else everyone
            q, k, v = layer.queries_keys_values(h[:, rows], [table[:, rows] for table in rope[layer.window]])
            write(*cache.layer(index), slots[:, rows], k, v)
            h[:, rows] = layer.update(h[:, rows], causal_attention(q, k, v, layer.scale, layer.window))
        cache.lengths += len(tokens)
        cache.boundary = len(tokens) - 1  # for `extend`: in pruned layers, the slots before it hold nothing
        return module.head(h[0, -1])

    @torch.no_grad()
    def extend(self, tokens: list[int], cache: pop.KVCache) -> torch.Tensor:
        module, begin = self.model.module, int(cache.lengths[0])
        end = begin + len(tokens)
        positions = torch.arange(begin, end, device=self.model.device)[None]  # [1, T]
        slots = torch.arange(end, device=self.model.device)  # [S]
        visible = slots <= positions[..., None]  # [1, T, S]
        h = module.embed(torch.tensor([tokens], device=self.model.device))
        rope = module.rope(positions)
        for index, layer in enumerate(module.layers):
            mask = visible & (slots >= cache.boundary) if index in self.plan.layers else visible
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            write(*cache.layer(index), positions, k, v)
            keys, values = (part[:, :end] for part in cache.layer(index))
            h = layer.update(h, masked_attention(q, keys, values, mask, layer.scale))
        cache.lengths += len(tokens)
        return module.head(h[0])

    def flops(self, num_tokens: int) -> None:
        return None


def no_boundary(model: pop.Model, fraction: float, windows=None) -> Contender:
    """POP on the deepest layers without boundary handling."""
    return NoBoundary("no-boundary", model, pop.PrunePlan.deepest(model.config.num_layers, fraction))


def no_kv(model: pop.Model, fraction: float, windows=None) -> Contender:
    """POP on the deepest layers without K/V projections."""
    return NoKV("no-kv", model, pop.PrunePlan.deepest(model.config.num_layers, fraction))


BASELINES: dict[str, Callable[[pop.Model, float, list[torch.Tensor]], Contender]] = {
    "shortgpt": shortgpt,
    "deepest-dropped": deepest_dropped,
    "slicegpt": slicegpt,
    "no-kv": no_kv,
    "no-boundary": no_boundary,
}


# ---- Common parts ----


def calibration_windows(model: pop.Model, texts: list, length: int = 512, most: int = 16) -> list[torch.Tensor]:
    """Texts, strings or token id lists, as at most `most` windows of up to `length` tokens, evenly spread: each [T]."""
    windows = []
    for text in texts:
        tokens = model.tokenizer.encode(text) if isinstance(text, str) else text
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=model.device)
        windows += tokens.split(min(length, model.max_seq_len))
    if not sum(map(len, windows)):
        raise InputError("the calibration texts are empty; give at least one that is not")
    step = max(1, math.ceil(len(windows) / most))
    return windows[::step]


def _embed(module: nn.Module, tokens: torch.Tensor):
    """tokens [T] -> h [1, T, D] and the rotary tables of their positions."""
    return module.embed(tokens[None]), module.rope(torch.arange(len(tokens), device=tokens.device)[None])


def _run_layer(layer: nn.Module, h: torch.Tensor, rope) -> torch.Tensor:
    q, k, v = layer.queries_keys_values(h, rope[layer.window])
    return layer.update(h, causal_attention(q, k, v, layer.scale, layer.window))


def _shared_copy(module: nn.Module) -> nn.Module:
    """A copy whose structure can be changed and whose parameters are those of `module` itself."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
