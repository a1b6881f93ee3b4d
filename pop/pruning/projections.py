"""Refit K and V projections: what a calibrated plan carries, and what its pruned layers use instead of their own.

A pruned layer projects K and V from a state its weights never saw: the one that enters the run of pruned layers it
belongs to. Refit projections (pop/calibration/refit.py) are fitted to that state. With x_t the state of token t, normalised
without a weight,

    one tap     k_t = W x_t + b
    two taps    k_t = W [x_t ; x_{t-1}] + b         x_{-1} = 0, before the sequence's first token

and likewise v_t. K's norm, where the family has one, and the rotary position follow as ever.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math

import torch

from pop.errors import PlanError
from pop.models.config import DTYPES


class KVProjections:
    """The refit projections of the n pruned layers of a plan.

    layers: their indices, in order.
    weight: [n, 2, K * E, taps * D]: K's, then V's; this token's input first, then the previous token's.
    bias: [n, 2, K * E]. fingerprint: of the model they were fitted to, as `fingerprint(module)` gives it.

    Raises PlanError where these do not fit each other.
    """

    def __init__(self, layers, weight: torch.Tensor, bias: torch.Tensor, fingerprint: str, taps: int):
        for tensor in (weight, bias):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values():
                raise PlanError("projections are tensors of float32, bfloat16 or float16; calibrate again")
        if (weight.dtype, weight.device) != (bias.dtype, bias.device):
            raise PlanError("the projections' weight and bias are of different dtypes or devices; calibrate again")
        if type(taps) is not int or taps not in (1, 2) or weight.dim() != 4 or weight.shape[3] % taps:
            raise PlanError(f"{taps!r} taps and a weight of shape {list(weight.shape)} are no projections")
        if weight.shape[:2] != (len(layers), 2) or bias.shape != weight.shape[:3]:
            raise PlanError(
                f"projections of {len(layers)} layers have a weight of shape [{len(layers)}, 2, K * E, taps * D] and a "
                f"bias of shape [{len(layers)}, 2, K * E], not {list(weight.shape)} and {list(bias.shape)}"
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise PlanError(f"the projections are not finite in {weight.dtype}; calibrate again, or take another dtype")
        self.layers = tuple(layers)
        self.weight, self.bias, self.fingerprint, self.taps = weight, bias, fingerprint, taps
        self.rows: list[int] | None = None  # of the K * E, those that are here; None: all
        self._copy: KVProjections | None = None  # the last one that `to` has made

    def __repr__(self) -> str:
        return f"KVProjections(layers={len(self.layers)}, taps={self.taps})"

    def __eq__(self, other) -> bool:
        if not isinstance(other, KVProjections):
            return NotImplemented
        same = (self.layers, self.fingerprint, self.taps) == (other.layers, other.fingerprint, other.taps)
        pairs = ((self.weight, other.weight), (self.bias, other.bias))
        return same and all(a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    def __hash__(self) -> int:
        return hash((self.layers, self.fingerprint, self.taps))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "per_layer"} | {"_copy": None}

    def to(self, device: torch.device, dtype: torch.dtype, rows: list[int] | None = None) -> KVProjections:
        """The same projections on `device` in `dtype`; the last copy is kept for the next call that asks for it.

        rows: which of the K * E rows to take, those of some K/V heads; None: all.
        """
        wanted = (device, dtype, rows)
        for ready in (self, self._copy):
            if ready is not None and (ready.weight.device, ready.weight.dtype, ready.rows) == wanted:
                return ready
        weight, bias = ((x if rows is None else x[:, :, rows]).to(device, dtype) for x in (self.weight, self.bias))
        copy = KVProjections(self.layers, weight, bias, self.fingerprint, self.taps)
        copy.rows = rows
        self._copy = copy  # now that it is whole: another thread may take it
        return copy

    @functools.cached_property
    def per_layer(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The weight [2, K * E, taps * D] and bias [2, K * E] of each layer: the same memory, but no views to torch.

        Compiled code is held to the size of what a view is a view of.
        """
        alias = lambda view: view.new_empty(0).set_(view)  # noqa: E731
        return [(alias(weight), alias(bias)) for weight, bias in zip(self.weight, self.bias, strict=True)]

    def inputs(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """All projections of a run read this: x [B, T, D], the x before it [B, D] -> [B, T, taps * D]."""
        if self.taps == 1:
            return x
        before = torch.cat((previous[:, None], x[:, :-1]), dim=1)  # [B, T, D]
        return torch.cat((x, before), dim=-1)


SAMPLES = 2**20  # of the values of each parameter, at most, that the fingerprint looks at
# Of the config: what changes no hidden state, or, of a vision tower, what its parameters tell.
UNREAD = {"dtype", "max_positions", "bos_id", "eos_ids", "vision", "image_id", "boi_id", "eoi_id"}


@torch.no_grad()
def fingerprint(module, part=None) -> str:
    """What tells a model from others: the same in float32 and bfloat16, and, of a 16-bit checkpoint, in float16.

    Each parameter is rounded to bfloat16, values too small for float16 to zero, and its bit patterns are added up,
    weighted by their place: a sum of integers is the same on every device and in any order. A float32 checkpoint cut
    to float16 is rounded twice and counts as another model.

    part: a pop.backends.tensor_parallel.Part, if the module is one; all ranks call this together, and it is the whole model's.
    """
    config = module.config if part is None else part.whole
    digest = hashlib.sha256()
    for field in dataclasses.fields(config):
        if field.name not in UNREAD:
            digest.update(f"{field.name} {getattr(config, field.name)}\n".encode())
    shapes, sums = [], []
    for name, parameter in sorted(module.named_parameters()):
        shape = parameter.shape if part is None else part.whole_shape(name, parameter)
        step = -(-math.prod(shape) // SAMPLES)
        if part is None:
            values = parameter.flatten()[::step]
            numbers = torch.arange(len(values), device=values.device)
        else:
            values, numbers = part.samples(name, parameter, step)
        values = values.to(torch.bfloat16)
        values = values.where(values.abs() >= torch.finfo(torch.float16).tiny, 0)
        bits = values.view(torch.int16).to(torch.int64)
        sums.append((bits * (numbers % 65521 + 1)).sum())  # stays below 2**52
        shapes.append(f"{name} {list(shape)}")
    total = torch.stack(sums)
    if part is not None:
        part.add_up(total)
    for shape, value in zip(shapes, total.tolist(), strict=True):
        digest.update(f"{shape} {value}\n".encode())
    return digest.hexdigest()
