"""Weight-only int8: the decoder's matrices rounded to 8 bits by torchao, and the products with them.

A row w of a matrix becomes integers q from -128 to 127 and one scale s, so that w is about s q. W x is then s (Q x).
Norms, the embedding, a head tied to it and a vision tower stay as they are. torchao's own products are slow on CPUs. So
decode multiplies by the integers as they are, and prefill copies some rows at a time to the dtype of the inputs.
"""

import torch
from torch import nn

from pop.backends.cpu import linear
from pop.errors import InputError, UnsupportedError, import_extra

COPIED_AT_ONCE = 2**23  # numbers; the allocator reuses blocks of this size, but gets larger ones from the system anew
LANES = 32  # torch's int8 kernel reads out of bounds unless the width is a multiple of this


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights."""

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.integers = nn.Parameter(integers, requires_grad=False)  # [out, in] int8
        self.scale = nn.Parameter(scale, requires_grad=False)  # [out], in the dtype of the inputs
        self.bias = bias  # [out], or None

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the matrix [out, in] in the dtype of the inputs."""
        return self.integers.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, in], or [B, in] and [in] for one token a row -> the same shape with `out` in place of `in`."""
        if torch.is_grad_enabled():  # the products below do not support gradients
            return linear(x, self.weight, self.bias)
        if x.dim() < 3 or x.shape[-2] == 1:
            rows = x.reshape(-1, x.shape[-1]).contiguous()  # [B, in]
            out = torch._weight_int8pack_mm(rows, self.integers, self.scale).view(*x.shape[:-1], -1)
        else:
            out = product_by_copies(x, self.integers, self.scale)
        return out if self.bias is None else out + self.bias


@torch.library.custom_op("pop::product_by_copies", mutates_args=())
def product_by_copies(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [B, T, in] -> [B, T, out], with a copy of some rows of the matrix at a time.

    This is one operator, because the compiler would replace its parts by the product for one token. A product with
    integers is up to 127 times too large before it is scaled, which float16 cannot hold.
    """
    wide = x.float() if x.dtype == torch.float16 else x
    rows = max(1, COPIED_AT_ONCE // integers.shape[1])
    blocks = zip(integers.split(rows), scale.split(rows), strict=True)
    return torch.cat([(linear(wide, block.to(wide.dtype)) * scales).to(x.dtype) for block, scales in blocks], dim=-1)


product_by_copies.register_fake(lambda x, integers, scale: x.new_empty(*x.shape[:-1], len(integers)))


def check_quantize(quantize, module, device: torch.device, ranks: int = 1) -> None:
    """Raise a PopError if `pop.load` cannot quantise the module (on any device, even meta) for `device`."""
    if quantize is None:
        return
    if quantize == "int4":
        raise UnsupportedError("quantize='int4' is not offered, since prefill takes 2.7 times as long; use 'int8'")
    if quantize != "int8":
        raise InputError(f"quantize is {quantize!r}; it must be 'int8' or None")
    if ranks > 1:
        raise UnsupportedError(f"int8 works in one process, not in {ranks}; leave out quantize or parallel")
    if device.type != "cpu":
        raise UnsupportedError(f"int8 is written for CPUs and untested on {device.type}; give device='cpu'")
    if any(weight.dim() > 2 for weight in module.layers.parameters()):
        raise UnsupportedError("int8 does not support mixtures of experts; leave out quantize")
    if unfit := {child.in_features for _, _, child in _linears(module) if child.in_features % LANES}:
        raise UnsupportedError(f"int8 needs multiples of {LANES}, but a width of {min(unfit)} is not; omit quantize")
    import_extra("torchao", "torchao", "quantize")


def quantize_module(module) -> None:
    """Replace the decoder's linear layers and an untied head by `Int8Linear`s, in place.

    The weights are rounded from float32. So the integers are the same whatever the dtype of the module is.
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
    """The linear layers to quantise, each as (owner, name of the attribute, layer)."""
    owners = [module, *(part for layer in module.layers for part in layer.modules())]
    children = [(owner, name, child) for owner in owners for name, child in owner.named_children()]
    return [(owner, name, child) for owner, name, child in children if isinstance(child, nn.Linear)]
