"""Weight-only int8: the decoder's matrices rounded to 8 bits by torchao, and what multiplies by them.

A row w of a matrix becomes integers q from -128 to 127 and one scale s, w = s q, rounded to the nearest, and y = W x is
s (Q x). Norms, the embedding, a head tied to it and a vision tower stay as they are. The rounding is torchao's; the
products are not. Measured on a CPU with AVX-512, torch 2.13 and torchao 0.18, a matrix of 14,336 x 4,096 and an input
in bfloat16, in milliseconds:

                                                  1 token    4 tokens   512 tokens
    not quantised, eager | compiled              6.5 | 4.1     6.2        142
    torchao's int8 tensor, eager | compiled       47 | 2.7      51 | 4.4  186 | 480
    here                                         2.7           3.9        170

So a step of decode, with one token a row, multiplies by the integers as they are, and several tokens are worth a copy
of the matrix in their dtype, some rows at a time. Of int4, torchao has no stable format that CPUs multiply by; its
prototype takes 1.9 ms for one token and 380 for 512, so that prefill, which pruning is for, would be 2.7 times as slow.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from pop.backends.cpu import linear
from pop.errors import InputError, MissingExtra, UnsupportedError

COPIED_AT_ONCE = 2**23  # numbers; larger blocks are new memory from the system each time, which takes longer to get
LANES = 32  # numbers; of a width that is no multiple, torch's product with integers reads what is behind the matrix


class Int8Linear(nn.Module):
    """A linear layer by a matrix of integers [out, in] int8 and a scale [out] for each row, in the inputs' dtype."""

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] in the inputs' dtype: a copy."""
        return self.integers.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `linear`: x [B, T, in], or [B, in] and [in] for one token a row -> likewise with `out`."""
        if torch.is_grad_enabled():  # the products below have no gradient
            return linear(x, self.weight, self.bias)
        if x.dim() < 3 or x.shape[-2] == 1:
            rows = x.reshape(-1, x.shape[-1]).contiguous()  # [B, in]
            out = torch._weight_int8pack_mm(rows, self.integers, self.scale).view(*x.shape[:-1], -1)
        else:
            out = product_by_copies(x, self.integers, self.scale)
        return out if self.bias is None else out + self.bias


@torch.library.custom_op("pop::product_by_copies", mutates_args=())
def product_by_copies(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [B, T, in] -> [B, T, out]. One operation to the compiler, which else makes it the product for one token."""
    rows = max(1, COPIED_AT_ONCE // integers.shape[1])
    parts = zip(integers.split(rows), scale.split(rows), strict=True)
    return torch.cat([linear(x, part.to(x.dtype)) * of_rows for part, of_rows in parts], dim=-1)


@product_by_copies.register_fake
def _(x, integers, scale):
    return x.new_empty(*x.shape[:-1], len(integers))


def check_quantize(quantize, module, device: torch.device, ranks: int = 1) -> None:
    """Raise, before any weight is read, where `quantize_module` would not serve the module (on the meta device)."""
    if quantize is None:
        return
    if quantize == "int4":
        raise UnsupportedError(
            "quantize='int4' is not offered: on CPUs torchao multiplies many tokens by 4 bits 2.7 times as slowly as "
            "by bfloat16, so prefill would lose more than pruning gains; take 'int8'"
        )
    if quantize != "int8":
        raise InputError(f"quantize is {quantize!r}; it is 'int8' or None")
    if ranks > 1:
        raise UnsupportedError(f"a model is quantised in one process, not in {ranks}; leave out quantize or parallel")
    if device.type != "cpu":
        raise UnsupportedError(f"int8 is written for CPUs and untested on {device.type}; give device='cpu'")
    if any(weight.dim() > 2 for weight in module.layers.parameters()):
        raise UnsupportedError("int8 does not serve mixtures of experts; leave out quantize")
    if unfit := {child.in_features for _, _, child in _linears(module) if child.in_features % LANES}:
        raise UnsupportedError(
            f"int8 takes widths that are multiples of {LANES}, and the model has one of {min(unfit)}"
        )
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtra("quantize needs the package torchao; run `pip install 'pop-prefill[quantize]'`")


def quantize_module(module) -> None:
    """Replace the decoder's linear layers, and a head of its own, by `Int8Linear`s.

    The integers are those of the weights in float32: the same whichever dtype the module has.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig(set_inductor_config=False, version=2)
    for owner, name, child in _linears(module):
        rounded = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
        rounded.weight = nn.Parameter(child.weight.float(), requires_grad=False)
        quantize_(rounded, config)
        integers, scale = rounded.weight.qdata, rounded.weight.scale.flatten()
        setattr(owner, name, Int8Linear(integers, scale.to(child.weight.dtype), child.bias))


def _linears(module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers to quantise, each with what it is an attribute of and its name there."""
    owners = [module, *(part for layer in module.layers for part in layer.modules())]
    children = [(owner, name, child) for owner in owners for name, child in owner.named_children()]
    return [(owner, name, child) for owner, name, child in children if isinstance(child, nn.Linear)]
