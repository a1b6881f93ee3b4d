"""Refit K and V projections: what a calibrated plan carries, and what replaces the pruned layers' projections.

A pruned layer projects K and V from a state that its weights were not trained on: the h that enters its group of pruned
layers. Refit projections (pop/calibration/refit.py) are fitted to that state. With x_t the state of token t, normalised
without a weight,

    one tap     k_t = W x_t + b
    two taps    k_t = W [x_t ; x_{t-1}] + b         x_{-1} = 0, before the sequence's first token

and likewise v_t. K's norm, where the family has one, and the rotary position follow as always.
"""

from __future__ import annotations

import torch

from pop.errors import PlanError, check_count
from pop.models.config import DTYPES


class KVProjections:
    """The refit projections of the n pruned layers of a plan.

    Args:
        layers: the layers' indices, in order.
        weight: [n, 2, K * E, taps * D], K's and then V's. This token's input comes first, then the previous token's.
        bias: [n, 2, K * E].
        fingerprint: of the model that they were fitted to (pop/checkpoints/fingerprint.py).
        taps: 1 or 2.

    Raises:
        PlanError: the arguments do not fit each other.
    """

    def __init__(self, layers, weight: torch.Tensor, bias: torch.Tensor, fingerprint: str, taps: int):
        taps = check_count("taps", taps, most=2, error=PlanError)
        for tensor in (weight, bias):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values():
                raise PlanError("projections are tensors of float32, bfloat16 or float16; calibrate again")
        if (weight.dtype, weight.device) != (bias.dtype, bias.device):
            raise PlanError("the projections' weight and bias differ in dtype or device; calibrate again")
        n, shapes = len(layers), (list(weight.shape), list(bias.shape))
        if weight.dim() != 4 or weight.shape[3] % taps or shapes[0][:2] != [n, 2] or shapes[1] != shapes[0][:3]:
            wanted = f"[{n}, 2, K * E, {taps} * D] and [{n}, 2, K * E]"
            raise PlanError(f"weight and bias have the shapes {shapes[0]} and {shapes[1]}, not {wanted}")
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise PlanError(f"the projections are not finite in {weight.dtype}; calibrate again, or use another dtype")
        self.layers = tuple(layers)
        self.weight, self.bias, self.fingerprint, self.taps = weight, bias, fingerprint, taps
        self.rows: list[int] | None = None  # which of the K * E rows these are; None: all
        self._copy: KVProjections | None = None  # the latest result of `to`

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
        return self.__dict__ | {"_copy": None}

    def to(self, device: torch.device, dtype: torch.dtype, rows: list[int] | None = None) -> KVProjections:
        """The same projections on `device` in `dtype`. The latest copy is kept for the next call that asks for it.

        rows: which of the K * E rows to take, those of some K/V heads. None: all.
        """
        wanted = (device, dtype, rows)
        for ready in (self, self._copy):
            if ready is not None and (ready.weight.device, ready.weight.dtype, ready.rows) == wanted:
                return ready
        weight, bias = ((x if rows is None else x[:, :, rows]).to(device, dtype) for x in (self.weight, self.bias))
        copy = KVProjections(self.layers, weight, bias, self.fingerprint, self.taps)
        copy.rows = rows
        self._copy = copy  # set last, since another thread may read it
        return copy

    def inputs(self, x: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """The input of all projections of a group: x [B, T, D] and the x before it [B, D] -> [B, T, taps * D]."""
        if self.taps == 1:
            return x
        before = torch.cat((previous[:, None], x[:, :-1]), dim=1)  # [B, T, D]
        return torch.cat((x, before), dim=-1)
