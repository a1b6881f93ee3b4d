"""What a calibrated plan carries: refit K and V projections of its pruned layers, and updates of h.

A pruned layer projects K and V from a state that its weights were not trained on: the h that enters its group of pruned
layers. Refit projections (pop/calibration/refit.py) are fitted to that state. With x_t the state of token t, normalised
without a weight,

    one tap     k_t = W x_t + b
    two taps    k_t = W [x_t ; x_{t-1}] + b         x_{-1} = 0, before the sequence's first token

and likewise v_t. K's norm, where the family has one, and the rotary position follow as always. If kept layers follow a
group, they need what its layers would have added to h. The plan approximates that by a linear map of the same inputs:

    h_t <- h_t + A [x_t ; x_{t-1}]                  after the group's last layer

Corrections of low rank are smaller. All layers of a group share a code z of R numbers, and keep their own projections
W0 and b0, with their norm weights folded in:

    z_t = V [x_t ; x_{t-1}]         k_t = W0 x_t + b0 + U z_t + b           h_t <- h_t + A z_t
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from pop.errors import PlanError, check_count
from pop.models.config import DTYPES


class KVProjections:
    """The refit projections of the n pruned layers of a plan, and its updates of h.

    Args:
        layers: the layers' indices, in order. They form G groups of consecutive layers.
        weight: W [n, 2, K * E, taps * D], or U [n, 2, K * E, R], K's and then V's. W takes this token's input first.
        bias: [n, 2, K * E].
        fingerprint: of the model that they were fitted to (pop/checkpoints/fingerprint.py).
        taps: 1 or 2.
        shared: V [G, R, taps * D], for corrections of low rank. Otherwise None.
        update: A [g, D, taps * D], or [g, D, R], of the first g groups. None: h passes all groups unchanged.

    Raises:
        PlanError: the arguments do not fit each other.
    """

    def __init__(self, layers, weight, bias, fingerprint: str, taps: int, shared=None, update=None):
        taps = check_count("taps", taps, most=2, error=PlanError)
        optional = {"shared": shared, "update": update}
        self.tensors = {"weight": weight, "bias": bias} | {name: x for name, x in optional.items() if x is not None}
        for tensor in self.tensors.values():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values():
                raise PlanError("projections are tensors of float32, bfloat16 or float16; calibrate again")
            if (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
                raise PlanError("the projections differ in dtype or device; calibrate again")
        n, shapes = len(layers), {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        fits = weight.dim() == 4 and shapes["weight"][:2] == [n, 2] and shapes["bias"] == shapes["weight"][:3]
        self.layers = tuple(layers)
        self.group = [0, *accumulate(int(b - a > 1) for a, b in pairwise(self.layers))]  # of each layer
        inputs = shapes["weight"] if shared is None else shapes["shared"]  # the last number is taps * D
        if shared is not None:
            fits = fits and shapes["shared"][:-1] == [self.group[-1] + 1, *shapes["weight"][3:]]
        if update is not None:
            wanted = ([g, inputs[-1] // taps, *shapes["weight"][3:]] for g in range(1, self.group[-1] + 2))
            fits = fits and shapes["update"] in wanted
        if not fits or inputs[-1] % taps:
            raise PlanError(f"the projections of {n} layers with {taps} taps have the shapes {shapes}; calibrate again")
        if not all(tensor.isfinite().all() for tensor in self.tensors.values()):
            raise PlanError(f"the projections are not finite in {weight.dtype}; calibrate again, or use another dtype")
        self.weight, self.bias, self.shared, self.update = weight, bias, shared, update
        self.fingerprint, self.taps = fingerprint, taps
        self.rows: list[int] | None = None  # which of the K * E rows these are; None: all
        self._copy: KVProjections | None = None  # the latest result of `to`

    @property
    def rank(self) -> int | None:
        """R, or None if the projections are whole."""
        return None if self.shared is None else self.shared.shape[1]

    def __repr__(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"KVProjections(layers={len(self.layers)}, taps={self.taps}{rank})"

    def __eq__(self, other) -> bool:
        if not isinstance(other, KVProjections):
            return NotImplemented
        if hash(self) != hash(other):  # of all but the values
            return False
        pairs = ((tensor.cpu(), other.tensors[name].cpu()) for name, tensor in self.tensors.items())
        return all(mine.dtype == its.dtype and torch.equal(mine, its) for mine, its in pairs)

    def __hash__(self) -> int:
        return hash((self.layers, self.fingerprint, self.taps, *self.tensors))

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
        split = () if rows is None else ("weight", "bias")
        tensors = {name: x[:, :, rows] if name in split else x for name, x in self.tensors.items()}
        copy = self.replaced({name: x.to(device, dtype) for name, x in tensors.items()})
        copy.rows = rows
        self._copy = copy  # set last, since another thread may read it
        return copy

    def replaced(self, tensors: dict[str, torch.Tensor]) -> KVProjections:
        """Projections of the same layers and model, with other tensors of the same names."""
        return KVProjections(layers=self.layers, fingerprint=self.fingerprint, taps=self.taps, **tensors)

    def inputs(self, x: torch.Tensor, previous: torch.Tensor, layer: int, linear=F.linear) -> torch.Tensor:
        """What `weight` and `update` multiply in the group of `layer`: x [B, T, D] and the x before it [B, D].

        Returns the taps * D values of each token, or its code of R numbers.
        """
        if self.taps == 2:
            before = torch.cat((previous[:, None], x[:, :-1]), dim=1)  # [B, T, D]
            x = torch.cat((x, before), dim=-1)
        return x if self.shared is None else linear(x, self.shared[self.group[self.layers.index(layer)]])

    def passed(self, h: torch.Tensor, inputs: torch.Tensor, layer: int, linear=F.linear) -> torch.Tensor:
        """h [B, T, D] after the group that ends with `layer`, from the h that entered it and its inputs [B, T, _]."""
        group = self.group[self.layers.index(layer)]
        has_update = self.update is not None and group < len(self.update) and layer + 1 not in self.layers
        return h + linear(inputs, self.update[group]) if has_update else h
