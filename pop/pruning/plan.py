"""The pruning plan: which layers the prompt skips, which prompt tokens skip nothing, and what K and V come from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from itertools import groupby
from operator import index
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pop.errors import PlanError
from pop.files import replaced
from pop.pruning.projections import KVProjections


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """Which layers prefill skips (only their K and V are computed), and which tokens run at full depth.

    layers: indices of the pruned layers, 0 <= index < L, stored sorted. Empty: nothing is pruned.
    full_depth_last: the last w tokens of every prompt run the whole model; w >= 1, and 1 is the paper: the
        boundary token, whose logits predict the first new token.
    full_depth_first: so do the first s tokens of the sequence, the attention sinks; 0 is the paper.
    projections: refit K and V projections for the pruned layers (pop.calibrate makes them), or None: the layers'
        own, the paper. Refit ones need full_depth_first >= 1, since they are not fitted to the first token.

    Raises PlanError for anything else.
    """

    layers: tuple[int, ...] = ()
    full_depth_last: int = 1
    full_depth_first: int = 0
    projections: KVProjections | None = None

    def __post_init__(self):
        try:
            layers = tuple(self.layers)
        except TypeError:
            raise PlanError(f"layers is {self.layers!r}; give indices, as in layers=(20, 21)") from None
        for layer in layers:
            if not _is_count(layer):
                raise PlanError(f"layers holds {layer!r}; layer indices are integers from 0 up")
        layers = tuple(sorted(map(index, layers)))
        if len(set(layers)) < len(layers):
            raise PlanError(f"layers names a layer twice: {layers}")
        object.__setattr__(self, "layers", layers)
        if not _is_count(self.full_depth_last) or self.full_depth_last < 1:
            raise PlanError(
                f"full_depth_last is {self.full_depth_last!r}; it is a number of tokens, and at least 1, since the "
                "first new token is predicted from the last prompt token at full depth"
            )
        if not _is_count(self.full_depth_first):
            raise PlanError(f"full_depth_first is {self.full_depth_first!r}; it is a number of tokens, 0 or more")
        for name in ("full_depth_last", "full_depth_first"):
            object.__setattr__(self, name, index(getattr(self, name)))
        if self.projections is not None:
            self._check_projections()

    def _check_projections(self) -> None:
        if not isinstance(self.projections, KVProjections):
            raise PlanError(
                f"projections is a {type(self.projections).__name__}; pop.calibrate makes what belongs there"
            )
        if self.projections.layers != self.layers:
            raise PlanError(
                f"the plan prunes the layers {self.layers}, but its projections are those of "
                f"{self.projections.layers}; calibrate again"
            )
        if self.full_depth_first < 1:
            raise PlanError(
                "full_depth_first is 0, but refit projections need at least 1: the first token, the attention sink, is "
                "unlike all others and not what they are fitted to"
            )

    @classmethod
    def none(cls) -> PrunePlan:
        """The plan that prunes nothing: prefill is the plain forward pass."""
        return cls()

    @classmethod
    def deepest(cls, num_layers: int, fraction: float) -> PrunePlan:
        """Prune the deepest floor(num_layers * fraction) layers; 0 <= fraction <= 1."""
        if not _is_count(num_layers):
            raise PlanError(f"num_layers is {num_layers!r}; it is the model's number of layers")
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise PlanError(f"fraction is {fraction!r}; it is the share of the layers to prune, from 0 to 1")
        # The small term keeps 100 * 0.29 = 28.999999999999996 from losing a layer.
        count = math.floor(num_layers * fraction + 1e-9)
        return cls(layers=tuple(range(num_layers - count, num_layers)))

    def check(self, num_layers: int) -> PrunePlan:
        """Return the plan itself if it fits a model of `num_layers` layers, else raise PlanError."""
        if self.layers and self.layers[-1] >= num_layers:
            raise PlanError(
                f"the plan prunes layer {self.layers[-1]}, but the model's layers are 0 to {num_layers - 1}"
            )
        return self

    def runs(self, num_layers: int, alone: int = 0) -> list[tuple[bool, list[int]]]:
        """Split layers 0 .. num_layers - 1 into runs of consecutive (pruned?, indices), in order.

        alone: so many of the first layers are runs of their own, since something is added to h behind each of them.
        """
        pruned = set(self.layers)
        runs = groupby(range(num_layers), key=lambda layer: (layer in pruned, min(layer, alone)))
        return [(skip, list(run)) for (skip, _), run in runs]

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan to a file, whole or not at all: JSON, or safetensors if it carries projections."""
        try:
            with replaced(path) as draft:
                if self.projections is None:
                    draft.write_text(json.dumps(self._fields(), indent=2) + "\n", encoding="utf-8")
                else:
                    refit = self.projections
                    tensors = {"weight": refit.weight.cpu(), "bias": refit.bias.cpu()}
                    fields = self._fields() | {"taps": refit.taps, "fingerprint": refit.fingerprint}
                    draft.write_bytes(save(tensors, metadata={"pop_plan": json.dumps(fields)}))
        except (OSError, ValueError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PlanError(f"the plan cannot be written to {path} ({reason}); choose another path") from None

    def _fields(self) -> dict:
        """All but the projections."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrunePlan:
        """Read a plan written by `save`; projections come in on the CPU. Raises PlanError if the file holds no plan."""
        if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
            raise PlanError(f"there is no plan file {path}; write one with plan.save(path)")
        try:
            with open(path, "rb") as file:
                is_json = b"\0" not in file.read(8)  # where a safetensors file has the length of its header
            if is_json:
                fields = json.loads(Path(path).read_text(encoding="utf-8"))
            else:
                fields = _read_projections(path)
            if "layers" not in fields:
                raise PlanError("it names no layers")
            return cls(**fields)
        except (PlanError, OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
            raise PlanError(f"{path} is not a pruning plan ({error}); write one with plan.save(path)") from None


def _read_projections(path) -> dict:
    """The fields of a plan with projections, from its safetensors file."""
    with safe_open(path, framework="pt") as file:
        fields = json.loads((file.metadata() or {})["pop_plan"])
        weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    refit = KVProjections(fields["layers"], weight, bias, str(fields.pop("fingerprint")), fields.pop("taps"))
    return fields | {"projections": refit}


def _is_count(value) -> bool:
    try:
        return not isinstance(value, bool) and index(value) >= 0
    except TypeError:
        return False
