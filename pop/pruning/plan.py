"""The pruning plan: which layers the prompt skips, which tokens skip nothing, and where K and V come from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from itertools import groupby

from safetensors import SafetensorError
from safetensors.torch import save

from pop.errors import PlanError, check_count
from pop.pruning.projections import KVProjections
from pop.system import __version__, files

SELECTING = 16  # the last tokens of a prompt, which select others by their attention
POOLED = 20  # tokens whose scores are averaged: a token and those before it
RECORD = 10_000  # the most characters of `about` as JSON
SHIPPED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "data", "plans")


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """Which layers prefill skips, and which tokens run at full depth. Of a skipped layer only K and V are computed.

    Args:
        layers: indices of the pruned layers, 0 <= index < L, stored sorted. Empty: nothing is pruned.
        full_depth_last: the last w tokens of every prompt run the whole model. w is at least 1, since the boundary
            token predicts the first new token. The paper has w = 1.
        full_depth_first: the first s tokens of the sequence, the attention sinks, also run it. The paper has s = 0.
        projections: refit K and V projections for the pruned layers, and updates of h, made by pop.calibrate. None: the
            layers' own, as in the paper. They need full_depth_first >= 1, since they are not fitted to the first token.
        full_depth_selected: the share of a prompt's other tokens that run at full depth: those that its last tokens
            attend most at the selecting layer. They skip the pruned layers before it, as other tokens do.
        selecting_layer: a kept layer before pruned ones, or the first of consecutive pruned layers. None: the first
            pruned layer.
        about: a record for readers, as a small object of JSON. pop.calibrate fills it. It is not compared.

    Raises:
        PlanError: any other value.
    """

    layers: tuple[int, ...] = ()
    full_depth_last: int = 1
    full_depth_first: int = 0
    projections: KVProjections | None = None
    full_depth_selected: float = 0.0
    selecting_layer: int | None = None
    about: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        try:
            layers = tuple(sorted(check_count("a layer index", layer, 0, error=PlanError) for layer in self.layers))
        except TypeError:
            raise PlanError(f"layers is {self.layers!r}; give indices, as in layers=(20, 21)") from None
        if len(set(layers)) < len(layers):
            raise PlanError(f"layers names a layer twice: {layers}")
        object.__setattr__(self, "layers", layers)
        for name, least in (("full_depth_last", 1), ("full_depth_first", 0)):
            object.__setattr__(self, name, check_count(name, getattr(self, name), least, 2**31 - 1, PlanError))
        share = _share("full_depth_selected", self.full_depth_selected, "the prompt's tokens to run at full depth")
        object.__setattr__(self, "full_depth_selected", share)
        if (at := self.selecting_layer) is not None:
            object.__setattr__(self, "selecting_layer", check_count("selecting_layer", at, 0, error=PlanError))
            if at > max(layers, default=-1) or {at - 1, at} <= set(layers):
                which = "a kept layer before a pruned one, or the first of consecutive pruned layers"
                raise PlanError(f"selecting_layer is {at}; it must be {which}, and the plan prunes {layers}")
        object.__setattr__(self, "about", _copied(self.about))
        if self.projections is None:
            return
        if not isinstance(self.projections, KVProjections):
            raise PlanError(f"projections is a {type(self.projections).__name__}; pop.calibrate makes KVProjections")
        if self.projections.layers != self.layers:
            raise PlanError(
                f"the plan prunes the layers {self.layers}, but its projections are for {self.projections.layers}; "
                "calibrate again"
            )
        if self.full_depth_first < 1:
            raise PlanError("full_depth_first is 0, but refit projections are not fitted to the first token; give 1")

    @classmethod
    def none(cls) -> PrunePlan:
        """The plan that prunes nothing: prefill is the plain forward pass."""
        return cls()

    @classmethod
    def deepest(cls, num_layers: int, fraction: float) -> PrunePlan:
        """Prune the deepest floor(num_layers * fraction) layers; 0 <= fraction <= 1."""
        num_layers = check_count("num_layers", num_layers, 0, error=PlanError)
        count = _floor(num_layers * _share("fraction", fraction, "the layers to prune"))
        return cls(layers=tuple(range(num_layers - count, num_layers)))

    @classmethod
    def of(cls, prune, num_layers: int) -> PrunePlan:
        """The plan for "default", None, a fraction of the layers, a saved plan as in `load`, or a plan that fits.

        As on the command line, "none" stands for None, and a number may be text. An integer other than 0 is refused:
        1 could mean one layer or all layers.
        """
        for number in (int, float) if isinstance(prune, str) else ():
            with contextlib.suppress(ValueError):
                prune = number(prune)
                break
        if prune is None or prune == "none":
            return cls.none()
        if isinstance(prune, PrunePlan):
            return prune.check(num_layers)
        if isinstance(prune, str) and prune == "default":
            return cls.deepest(num_layers, 1 / 3)
        if isinstance(prune, float) or (type(prune) is int and prune == 0):
            return cls.deepest(num_layers, prune)
        if isinstance(prune, (str, os.PathLike)) and os.path.isfile(path := _saved(prune)):
            return cls.load(path).check(num_layers)
        kinds = "'default', 'none', a share of layers (1/3, or 1.0 for all), a saved plan's path or name, a PrunePlan"
        raise PlanError(f"the plan is {prune!r:.200}; it must be {kinds}")

    def check(self, num_layers: int) -> PrunePlan:
        """Return the plan itself if it fits a model of `num_layers` layers, and raise PlanError otherwise."""
        if self.layers and self.layers[-1] >= num_layers:
            raise PlanError(
                f"the plan prunes layer {self.layers[-1]}, but the model's layers are 0 to {num_layers - 1}"
            )
        return self

    def speedup(self, model, prompt_tokens: int) -> float:
        """The most that a prefill of `prompt_tokens` tokens of text can gain: F(none) / F(plan), see cost.py.

        Args:
            model: A pop.Model.
        """
        from pop.pruning.cost import speedup_limit  # here, because it imports this file

        plan = self.check(model.config.num_layers)
        return speedup_limit(model.config, check_count("prompt_tokens", prompt_tokens), plan)

    @property
    def selects_at(self) -> int:
        """The layer that selects tokens, of a plan with layers. Selected tokens run each pruned layer from it on."""
        return self.layers[0] if self.selecting_layer is None else self.selecting_layer

    def num_selected(self, others: int) -> int:
        """How many of the `others`, a prompt's tokens that are not at full depth by their position, are selected."""
        return _floor(others * self.full_depth_selected) if self.layers else 0

    def groups(self, num_layers: int, deepstack_layers: int = 0) -> list[tuple[bool, list[int]]]:
        """Split layers 0 to num_layers - 1 into groups of consecutive layers, each (pruned?, indices).

        Features of images are added to h after each of the first `deepstack_layers` layers. So each of these is a group
        of one layer.
        """
        pruned = set(self.layers)
        groups = groupby(range(num_layers), key=lambda layer: (layer in pruned, min(layer, deepstack_layers)))
        return [(is_pruned, list(group)) for (is_pruned, _), group in groups]

    def fields(self) -> dict:
        """All but the projections and the record. Without selection, the fields are those of files from before it."""
        selected = {"full_depth_selected": self.full_depth_selected or None, "selecting_layer": self.selecting_layer}
        selected = {name: value for name, value in selected.items() if value is not None}
        return {name: getattr(self, name) for name in ("layers", "full_depth_last", "full_depth_first")} | selected

    def save(self, path: str | os.PathLike) -> None:
        """Write plan and version to a file, whole or not at all: JSON, or safetensors if it has projections."""
        fields = self.fields() | {"about": _copied({"version": __version__} | self.about)}
        if self.projections is None:
            content = json.dumps(fields, indent=2) + "\n"
        else:
            refit = self.projections
            fields |= {"taps": refit.taps, "fingerprint": refit.fingerprint}
            tensors = {name: tensor.cpu() for name, tensor in refit.tensors.items()}
            content = save(tensors, metadata={"pop_plan": json.dumps(fields)})
        files.write_whole(path, content, "the plan", PlanError)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrunePlan:
        """Read a plan that `save` has written, with projections on the CPU. Raises PlanError for any other file.

        path: A file, or the name of a plan that ships with the package, such as "smollm2-135m-third".
        """
        if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path := _saved(path)):
            raise PlanError(f"there is no plan file {path}; write one with plan.save(path)")
        try:
            try:
                tensors, metadata = files.read_tensors(path)
            except SafetensorError:
                fields = files.read_json(path, PlanError)
            else:
                fields = json.loads(metadata["pop_plan"])
                fingerprint, taps = str(fields.pop("fingerprint")), fields.pop("taps")
                fields["projections"] = KVProjections(fields["layers"], fingerprint=fingerprint, taps=taps, **tensors)
            if "layers" not in fields:
                raise PlanError("it names no layers")
            return cls(**fields)
        except (PlanError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(f"{path} is not a pruning plan ({error}); write one with plan.save(path)") from None


def _saved(path: str | os.PathLike) -> str:
    """The path of a saved plan. A name without a file stands for a plan that ships with the package."""
    path, shipped = os.path.expanduser(path), os.path.join(SHIPPED, f"{path}.plan")
    return path if os.path.isfile(path) or os.path.dirname(path) or not os.path.isfile(shipped) else shipped


def _copied(about) -> dict:
    """A copy of a plan's record, as its file would give it back."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        if isinstance(about, dict) and len(text := json.dumps(about, allow_nan=False)) <= RECORD:
            return json.loads(text)
    raise PlanError(f"about is a {type(about).__name__}; give a dict, of at most {RECORD:,} characters as JSON")


def _share(name: str, value, of_what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise PlanError(f"{name} is {value!r}; it is the share of {of_what}, from 0 to 1")
    return float(value)


def _floor(number: float) -> int:
    """The small term keeps 100 * 0.29 = 28.999999999999996 from losing one."""
    return math.floor(number + 1e-9)
