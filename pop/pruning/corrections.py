"""What a calibrated plan adds to plain pruning: corrections of K and V, and updates of h.

A pruned layer projects K and V from the h that enters its group of consecutive pruned layers. Except in the first layer
of the first pruned group, its weights were trained on another state. Calibration (pop/calibration) measures the
resulting error and fits a correction to it. With x_t the state of token t, normalised without a weight, and x_{-1} = 0,

    z_t = P [x_t ; x_{t-1}]               a code of R numbers for each token, shared by the layers of the group
    k_t, v_t  =  own projections of h_t  +  U z_t
    h_t  <-  h_t + A z_t                  after the group, if kept layers follow it

K's norm, where the family has one, and the rotary position follow as always. Kept layers after a group need what its
layers would have added to h. A z_t approximates that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.errors import PlanError
from pop.models.config import DTYPES
from pop.models.layers import KeysValues
from pop.pruning.sketch import SKETCH_SIZE


class GroupCorrections(NamedTuple):
    """The corrections of one group of n pruned layers."""

    shared: Tensor  # P [R, 2 * D]
    weight: Tensor  # U [n, 2 * K * E, R]: K's rows come first, and then V's
    update: Tensor | None  # A [D, R], or None if no kept layer follows

    def with_update(self, h: Tensor, z: Tensor, linear=F.linear) -> Tensor:
        """h [B, T, D] after the group, from the h that entered it and its code z [B, T, R]."""
        return h if self.update is None else h + linear(z, self.update)


def code(layer, h: Tensor, previous: Tensor, shared: Tensor) -> Tensor:
    """The code z [B, T, R] of h [B, T, D], which enters a group of pruned layers that begins with `layer`.

    `previous` [B, D] is the state before each row's first one, and `shared` [R, 2 * D] is the group's P. compile.py
    knows the layer by the name of the parameter `layer`.
    """
    return layer.multiply(code_inputs(layer, h, previous), shared)


def code_inputs(layer, h: Tensor, previous: Tensor) -> Tensor:
    """[x_t ; x_{t-1}] of each token, [B, T, 2 * D], from which `code` computes z."""
    x = layer.normalised(h)
    # The state before each x, [B, T, D]. Not a slice: compiled code would depend on whether x has one token.
    column = torch.arange(x.shape[1], device=x.device)
    earlier = x[:, (column - 1).clamp(min=0)]
    before = torch.where((column > 0)[:, None], earlier, layer.normalised(previous)[:, None])
    return torch.cat((x, before), dim=-1)


def corrected_keys_values(layer, h, z, weight, rope) -> KeysValues:
    """K and V of a pruned layer of a calibrated plan, each [B, T, K, E], as the cache holds them.

    Args:
        layer: The PrunableLayer.
        h: [B, T, D], enters the layer's group.
        z: [B, T, R], the code of h.
        weight: The layer's U [2 * K * E, R].
        rope: The tokens' rotary tables.
    """
    own_k, own_v = layer.projected(h)  # [B, T, K * E] each
    k, v = layer.multiply(z, weight).chunk(2, dim=-1)  # [B, T, K * E] each
    return layer.finished_keys_values(own_k + k, own_v + v, rope)


class Corrections:
    """The corrections of all n pruned layers of a plan, which form m groups of consecutive layers.

    They compare by identity.

    Args:
        layers: The indices of the layers, in order.
        weight: U [n, 2, K * E, R], for K and for V.
        shared: P [m, R, 2 * D].
        update: A [g, D, R], for each of the g groups that kept layers follow: all groups, or all but the last. None if
            there is no such group.
        sketch: Of the layers that they were fitted to, [n, 2, J] float32 on the CPU (sketch.py).

    Raises:
        PlanError: The tensors do not fit each other, or are not finite.
    """

    def __init__(self, layers, weight, shared, update=None, *, sketch: Tensor):
        self.layers = tuple(layers)
        self.weight = weight
        self.shared = shared
        self.update = update
        self.sketch = sketch
        self.rows: Sequence[int] | None = None  # which of the K * E rows these are; None: all
        self._copy: Corrections | None = None  # the latest result of `to`
        self._check()

    def _check(self) -> None:
        for tensor in self.tensors.values():
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
                raise PlanError("corrections are tensors of float32, bfloat16 or float16; calibrate again")
            if (tensor.dtype, tensor.device) != (self.weight.dtype, self.weight.device):
                raise PlanError("the corrections differ in dtype or device; calibrate again")
            if not tensor.isfinite().all():
                raise PlanError(
                    f"the corrections are not finite in {tensor.dtype}; calibrate again, or use another dtype"
                )
        shapes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        if not self._fits(**shapes):
            raise PlanError(f"the corrections of {len(self.layers)} layers have the shapes {shapes}; calibrate again")
        shape = (len(self.layers), 2, SKETCH_SIZE)
        if (self.sketch.shape, self.sketch.dtype) != (shape, torch.float32):
            raise PlanError(f"the corrections need a sketch of their layers' weights, {shape} float32; calibrate again")

    def _fits(self, weight: list[int], shared: list[int], update: list[int] | None = None) -> bool:
        """Whether the shapes are those that the class states."""
        if len(weight) != 4 or len(shared) != 3:
            return False
        num_groups = self._groups[-1] + 1
        rank = weight[3]
        D = shared[2] // 2
        updates = [[count, D, rank] if count else None for count in (num_groups - 1, num_groups)]
        return weight[:2] == [len(self.layers), 2] and shared == [num_groups, rank, 2 * D] and update in updates

    @property
    def _groups(self) -> list[int]:
        """The number of each layer's group."""
        begins_group = (b > a + 1 for a, b in pairwise(self.layers))  # whether a layer does, for all but the first
        return list(accumulate(begins_group, initial=0))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as in a saved plan."""
        tensors = {"weight": self.weight, "shared": self.shared}
        return tensors if self.update is None else tensors | {"update": self.update}

    @property
    def rank(self) -> int:
        """R, the size of a code."""
        return self.shared.shape[1]

    def group(self, layers: range) -> GroupCorrections:
        """The corrections of consecutive pruned layers, all of a group or its part between DeepStack features."""
        first = self.layers.index(layers[0])
        number = self._groups[first]
        ends = layers[-1] + 1 not in self.layers
        has_update = self.update is not None and ends and number < len(self.update)
        return GroupCorrections(
            shared=self.shared[number],
            weight=self.weight[first : first + len(layers)].flatten(1, 2),  # [n, 2 * K * E, R]
            update=self.update[number] if has_update else None,
        )

    def to(self, device: torch.device, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Corrections:
        """The same corrections on `device` in `dtype`. The latest copy is kept for the next call that asks for it.

        Args:
            device, dtype: Of the copy.
            rows: Which of the K * E rows to take, those of some K/V heads. None: all.
        """
        wanted = (device, dtype, rows)
        for ready in (self, self._copy):
            if ready is not None and (ready.weight.device, ready.weight.dtype, ready.rows) == wanted:
                return ready
        tensors = self.tensors
        if rows is not None:
            tensors["weight"] = self.weight[:, :, rows]
        copy = self.replaced({name: tensor.to(device, dtype) for name, tensor in tensors.items()})
        copy.rows = rows
        self._copy = copy  # set last, since another thread may read it
        return copy

    def replaced(self, tensors: dict[str, Tensor]) -> Corrections:
        """Corrections of the same layers and model, with other tensors of the same names."""
        return Corrections(self.layers, sketch=self.sketch, **tensors)

    def __repr__(self) -> str:
        return f"Corrections(layers={len(self.layers)}, rank={self.rank})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_copy": None}
