"""Refit K and V projections: what a calibrated plan carries, and what its pruned layers use instead of their own.

A pruned layer projects K and V from a state its weights never saw: the one that enters the run of pruned layers it
belongs to. Refit projections (pop/calibrate.py) are fitted to that state. With x_t the state of token t, normalised
without a weight,

    one tap     k_t = W x_t + b
    two taps    k_t = W [x_t ; x_{t-1}] + b         x_{-1} = 0, before the sequence's first token

and likewise v_t. K's norm, where the family has one, and the rotary position follow as ever.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F

from pop.errors import PlanError


class KVProjections:
    """The refit projections of the n layers of a plan, in the plan's order.

    weight: [n, 2, K * E, taps * D]: K's, then V's; this token's input first, then the previous token's.
    bias: [n, 2, K * E]. fingerprint: of the model they were fitted to, as `fingerprint(module)` gives it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, fingerprint: str, taps: int):
        if taps not in (1, 2) or weight.dim() != 4 or weight.shape[1] != 2 or weight.shape[3] % taps:
            raise PlanError(
                f"projections of shape {list(weight.shape)} with {taps} taps; the shape is [layers, 2, K * E, taps * D]"
            )
        if bias.shape != weight.shape[:3]:
            raise PlanError(f"a bias of shape {list(bias.shape)} does not fit a weight of shape {list(weight.shape)}")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise PlanError("the projections hold values that are not finite numbers; calibrate again")
        self.weight, self.bias, self.fingerprint, self.taps = weight, bias, fingerprint, taps
        self._copies: dict = {}

    def __repr__(self) -> str:
        return f"KVProjections(layers={self.weight.shape[0]}, taps={self.taps})"

    def __eq__(self, other) -> bool:
        if not isinstance(other, KVProjections):
            return NotImplemented
        same = (self.fingerprint, self.taps) == (other.fingerprint, other.taps)
        pairs = ((self.weight, other.weight), (self.bias, other.bias))
        return same and all(a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.taps, self.weight.shape))

    def to(self, device: torch.device, dtype: torch.dtype) -> KVProjections:
        """The same projections on `device` in `dtype`, kept for the next call that asks for them."""
        if (self.weight.device, self.weight.dtype) == (device, dtype):
            return self
        if (device, dtype) not in self._copies:
            weight, bias = (x.to(device, dtype) for x in (self.weight, self.bias))
            self._copies[device, dtype] = KVProjections(weight, bias, self.fingerprint, self.taps)
        return self._copies[device, dtype]

    def inputs(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """All projections of a run read this: x [B, T, D], the x before it [B, D] -> [B, T, taps * D]."""
        if self.taps == 1:
            return x
        before = torch.cat((previous[:, None], x[:, :-1]), dim=1)  # [B, T, D]
        return torch.cat((x, before), dim=-1)

    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, T, K * E] of the plan's layer number `layer`, from inputs [B, T, taps * D]."""
        out = F.linear(inputs, self.weight[layer].flatten(0, 1), self.bias[layer].flatten())
        return out.chunk(2, dim=-1)


SAMPLES = 2**20  # of the values of each parameter, at most, that the fingerprint looks at


@torch.no_grad()
def fingerprint(module) -> str:
    """What tells a model's weights from others', whatever dtype and device they were loaded to.

    Each parameter is rounded to bfloat16, values too small for float16 to zero, and its bit patterns are added up:
    a sum of integers is the same on every device and in every order.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        values = parameter.flatten()
        values = values[:: -(-len(values) // SAMPLES)].to(torch.bfloat16)
        values = values.where(values.abs() >= torch.finfo(torch.float16).tiny, 0)
        bits = values.view(torch.int16)
        digest.update(f"{name} {list(parameter.shape)} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()
