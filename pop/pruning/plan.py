"""The pruning plan: which layers the prompt skips, which tokens run at full depth, and the layers' corrections."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from pop.errors import PlanError, check_count, some
from pop.pruning.corrections import Corrections, GroupCorrections
from pop.system import __version__, files

SELECTING = 16  # the last tokens of a prompt, which select others by their attention
POOLED = 20  # tokens whose scores are averaged: a token and those before it
MOST_LAYERS = 10_000  # of a model
MOST_TOKENS = 10_000_000  # of a prompt
LAYERS = r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)+|\d{1,5}-\d{1,5}"  # one integer could be a share
RECORD = 10_000  # the most characters of `about` as JSON
SHIPPED = Path(__file__).parents[1] / "data" / "plans"  # where the plans are that ship with the package
SHARES = {"none": 0.0, "third": 1 / 3}  # of the layers, by the words that stand for them
COUNTS = {"full_depth_last": 1, "full_depth_first": 0, "full_depth_below": 0}  # fields, and the least of each


class Group(NamedTuple):
    """Consecutive layers that are all pruned or all kept."""

    layers: range
    is_pruned: bool
    corrections: GroupCorrections | None = None  # of a pruned group in a calibrated plan


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """Which layers prefill skips, and which tokens run at full depth. Of a skipped layer only K and V are computed.

    Args:
        layers: The indices of the pruned layers, 0 <= index < L, stored sorted. Empty: nothing is pruned.
        full_depth_last: The last w tokens of every prompt run the whole model. w is at least 1, since the boundary
            token predicts the first new token. The paper has w = 1.
        full_depth_first: The first s tokens of the sequence, the attention sinks, also run it. The paper has s = 0.
        corrections: What pop.calibrate adds: corrections of the pruned layers' K and V, and updates of h. They need
            full_depth_first >= 1, since they are not fitted to the first token. None: plain pruning, as in the paper.
        full_depth_selected: The share of a prompt's tokens, without those at full depth by their position, that run all
            layers after the selecting layer. These are the tokens that the prompt's last tokens attend to most there.
            They skip the pruned layers before it. Tokens of earlier prompts in the cache that have skipped layers
            compete with them. Prefill asks `selects` whether, `num_selected` how many, and `selects_at` where.
        selecting_layer: A kept layer with pruned ones after it. None: the layer before the first pruned one.
        full_depth_below: All tokens of a sequence run at full depth if its prompt, with what the cache holds before it,
            has fewer tokens. In a short prompt, what pruning costs is more than what it saves.
        about: How the plan was made and judged, as a small object of JSON. pop.calibrate fills it, and `holds` reads
            its verdict. It is not compared.
        name: Of the file that `load` has read. It is not saved or compared.

    Raises:
        PlanError: A value is out of range, or values do not fit each other.
    """

    layers: Sequence[int] = ()  # any integers; a sorted tuple in the plan
    full_depth_last: int = 1
    full_depth_first: int = 0
    corrections: Corrections | None = None
    full_depth_selected: float = 0.0
    selecting_layer: int | None = None
    full_depth_below: int = 0
    about: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)
    name: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        def store(name: str, value) -> None:  # the class is frozen
            object.__setattr__(self, name, value)

        store("layers", _checked_layers(self.layers))
        for name, least in COUNTS.items():
            store(name, check_count(name, getattr(self, name), least, 2**31 - 1, PlanError))
        share = _share("full_depth_selected", self.full_depth_selected, "the prompt's tokens to run at full depth")
        store("full_depth_selected", share)
        if self.selecting_layer is not None:
            store("selecting_layer", check_count("selecting_layer", self.selecting_layer, 0, error=PlanError))
        store("about", _copied(self.about))
        self._check_selecting_layer()
        self._check_corrections()

    def _check_selecting_layer(self) -> None:
        layer = self.selecting_layer
        if layer is not None and (layer in self.layers or layer > max(self.layers, default=-1)):
            raise PlanError(
                f"selecting_layer is {layer}; it must be a kept layer with pruned ones after it, "
                f"and the plan prunes {self.layers}"
            )
        if self.full_depth_selected and self.selects_at == -1:
            raise PlanError(
                f"full_depth_selected is {self.full_depth_selected}, "
                "but no layer before the first pruned one can select tokens; keep layer 0"
            )

    def _check_corrections(self) -> None:
        corrections = self.corrections
        if corrections is None:
            return
        if not isinstance(corrections, Corrections):
            raise PlanError(f"corrections is a {type(corrections).__name__}; pop.calibrate makes Corrections")
        if corrections.layers != self.layers:
            raise PlanError(
                f"the plan prunes the layers {self.layers}, but its corrections are for {corrections.layers}; "
                "calibrate again"
            )
        if self.full_depth_first < 1:
            raise PlanError("full_depth_first is 0, but corrections are not fitted to the first token; give 1")

    @classmethod
    def none(cls) -> PrunePlan:
        """The plan that prunes nothing: prefill is the plain forward pass."""
        return cls()

    @classmethod
    def deepest(cls, num_layers: int, fraction: float) -> PrunePlan:
        """Prune the deepest floor(num_layers * fraction) layers; 0 <= fraction <= 1."""
        num_layers = check_count("num_layers", num_layers, 0, MOST_LAYERS, PlanError)
        count = _floor(num_layers * _share("fraction", fraction, "the layers to prune"))
        return cls(range(num_layers - count, num_layers))

    @classmethod
    def of(cls, prune, num_layers: int) -> PrunePlan:
        """The plan for None, a fraction of the layers, layers as in "10,12,19-29", a file as in `load`, or a plan.

        "third" stands for the deepest third of the layers, the paper's plan. As on the command line, "none" stands for
        None, and a number may be text. An integer other than 0 is refused: 1 could mean one layer or all layers.
        """
        if isinstance(prune, PrunePlan):
            return prune.check(num_layers)
        if prune is None:
            return cls.none()
        if isinstance(prune, str):
            prune = SHARES.get(prune, _as_number(prune))
        if isinstance(prune, float) or (type(prune) is int and prune == 0):
            return cls.deepest(num_layers, prune)
        if isinstance(prune, str) and re.fullmatch(LAYERS, prune):
            return cls(_indices(prune)).check(num_layers)
        if _saved(prune):
            return cls.load(prune).check(num_layers)
        no_file = ""
        if isinstance(prune, (str, os.PathLike)):
            names = [name for name in (*SHARES, "default", *_shipped()) if name != prune]
            near = get_close_matches(str(prune), names, n=1)
            no_file = ", which names no file" + (f" (a near name is {near[0]!r})" if near else "")
        raise PlanError(
            f"the plan is {prune!r:.200}{no_file}; it must be 'third', 'none', a share of the layers (0.5, or 1.0 for "
            "all), layers such as '10,12,19-29' ('9-9' for layer 9), the path of a saved plan or of importance scores, "
            f"the name of a plan that ships ({', '.join(_shipped())}), or a PrunePlan; with a model also 'default'"
        )

    def check(self, num_layers: int) -> PrunePlan:
        """Return the plan itself if it fits a model of `num_layers` layers, and raise PlanError otherwise."""
        if self.layers and self.layers[-1] >= num_layers:
            raise PlanError(
                f"the plan prunes layer {self.layers[-1]}, but the model's layers are 0 to {num_layers - 1}"
            )
        return self

    @classmethod
    def least_important(cls, scores: Sequence[float], count: int, **fields) -> PrunePlan:
        """Prune the `count` layers with the lowest scores. Of equal layers, prune the deeper one first.

        fields: The other fields of the plan.
        """
        count = check_count("count", count, 0, len(scores), PlanError)
        ranked = sorted(range(len(scores)), key=lambda layer: (float(scores[layer]), -layer))
        return cls(ranked[:count], **fields)

    @property
    def holds(self) -> bool:
        """Whether the plan holds by the verdict in its record. False if it knows none."""
        with contextlib.suppress(LookupError, TypeError):
            return bool(self.about["verdict"]["holds"])
        return False

    @property
    def judgement(self) -> str:
        """What a line on the plan says of its verdict, after a comma. Empty if its record has none."""
        with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
            share, low, high = self.about["verdict"]["kept"]
            limits = "" if self.holds else ", but does not hold"
            return f", keeps {share:.0%} [{low:.0%}, {high:.0%}] of pop check's answers{limits}"
        return ", does not hold" if "verdict" in self.about and not self.holds else ""

    def speedup(self, model, prompt_tokens: int) -> float:
        """The most that a prefill of `prompt_tokens` tokens of text can gain: F(none) / F(plan), see cost.py.

        It counts arithmetic only. On a GPU, launches bound short prompts, which then gain less or nothing.

        Args:
            model: A pop.Model.
        """
        from pop.pruning.cost import speedup_limit  # here, because it imports this file

        self.check(model.config.num_layers)
        prompt_tokens = check_count("prompt_tokens", prompt_tokens, most=MOST_TOKENS)
        return speedup_limit(model.config, prompt_tokens, self)

    @property
    def selects_at(self) -> int | None:
        """The layer that would select tokens. Selected tokens run each pruned layer after it.

        None: the plan prunes nothing. -1: layer 0 is pruned, and no selecting layer is given, so no token is selected.
        """
        if self.selecting_layer is not None or not self.layers:
            return self.selecting_layer
        return self.layers[0] - 1

    def at_full_depth(self, position, prompt_length):
        """Which tokens run at full depth by their position: bool, in the shape that the arguments broadcast to.

        Args:
            position: Of each token in its sequence. A tensor of torch or an array of numpy.
            prompt_length: Of each token's sequence. Later tokens are generated.
        """
        is_first = position < self.full_depth_first
        is_last_or_generated = position >= prompt_length - self.full_depth_last
        is_short = prompt_length < self.full_depth_below
        return is_first | is_last_or_generated | is_short

    @property
    def selects(self) -> bool:
        """Whether it selects tokens."""
        return bool(self.layers) and self.full_depth_selected > 0

    def num_selected(self, others: int) -> int:
        """How many of the `others`, a prompt's tokens that are not at full depth by their position, are selected."""
        return _floor(others * self.full_depth_selected) if self.layers else 0

    def num_pruned(self, prompt_length: int, cached: int = 0) -> int:
        """How many tokens of a prompt skip all pruned layers, in a prefill after the first `cached` of them.

        An estimate for a plan that selects tokens and continues a cache, since cached tokens then compete with these.
        """
        skips = ~self.at_full_depth(torch.arange(cached, prompt_length, device="cpu"), prompt_length)
        others = int(skips.sum()) if self.layers else 0
        return others - self.num_selected(others)

    def groups(self, num_layers: int, deepstack_layers: int = 0) -> list[Group]:
        """Split layers 0 to num_layers - 1 into groups of consecutive layers.

        Features of images are added to h after each of the first `deepstack_layers` layers. So each of these is a group
        by itself.
        """
        pruned = set(self.layers)

        def kind(index: int) -> tuple[bool, int]:
            # The index of a DeepStack layer, which is thus alone, and the same number for all later layers.
            return index in pruned, min(index, deepstack_layers)

        groups = []
        for (is_pruned, _), members in groupby(range(num_layers), key=kind):
            indices = list(members)
            layers = range(indices[0], indices[-1] + 1)
            is_corrected = is_pruned and self.corrections is not None
            corrections = self.corrections.group(layers) if is_corrected else None
            groups.append(Group(layers, is_pruned, corrections))
        return groups

    def to(self, device: torch.device, dtype: torch.dtype, rows: Sequence[int] | None = None) -> PrunePlan:
        """The same plan, with corrections as `Corrections.to` gives them if it has any."""
        if self.corrections is None:
            return self
        return dataclasses.replace(self, corrections=self.corrections.to(device, dtype, rows))

    def fields(self) -> dict:
        """The plain values: all but the corrections, the record and the name."""
        return {name: value for name, value in vars(self).items() if name not in ("corrections", "about", "name")}

    def save(self, path: str | os.PathLike) -> None:
        """Write plan and version to a file, whole or not at all: JSON, or safetensors if it has corrections."""
        fields = self.fields() | {"about": _copied({"version": __version__} | self.about)}
        if self.corrections is None:
            content = (json.dumps(fields, indent=2) + "\n").encode()
        else:
            tensors = self.corrections.tensors | {"sketch": self.corrections.sketch}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            content = save(tensors, metadata={"pop_plan": json.dumps(fields)})
        files.write_whole(path, content, "the plan", PlanError)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PrunePlan:
        """Read a plan that `save` has written, with corrections on the CPU. Raises PlanError for any other file.

        Importance scores that `pop.Importance.save` has written give the third of the layers that prefill needs least.

        Args:
            path: A file, or the name of a plan that ships with the package, such as "smollm2-135m-third".
        """
        file = _saved(path)
        if file is None:
            raise PlanError(f"there is no plan file {path}; write one with plan.save(path)")
        try:
            fields = _read(file)
            name = some([os.path.basename(file)])
            if "prefill" in fields:
                # Raises for what are not numbers.
                scores = torch.tensor(fields["prefill"], dtype=torch.float64).tolist()
                return cls.least_important(scores, len(scores) // 3, name=name)
            if "layers" not in fields:
                raise PlanError("it names no layers")
            return cls(**fields, name=name)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
            raise PlanError(
                f"{file} is not a pruning plan that this version reads ({error}); "
                "use the version that wrote it, or calibrate again"
            ) from None


def _read(path: str | os.PathLike) -> dict:
    """The fields of the plan in a file."""
    try:
        tensors, metadata = files.read_tensors(path)
    except SafetensorError:  # a plan without corrections
        return files.read_json(path, PlanError)
    fields = json.loads(metadata["pop_plan"])
    for name in tensors.keys() - {"weight", "shared", "update", "sketch"}:
        raise PlanError(f"it has a tensor {name!r:.100}, and no corrections have one of this name; calibrate again")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # the file may change while the plan is used
    fields["corrections"] = Corrections(fields["layers"], **copies)
    return fields


def _indices(text: str) -> list[int]:
    """The layers in a text like "10,12,19-29"."""
    indices = []
    for part in text.split(","):
        ends = sorted(map(int, part.split("-")))
        indices.extend(range(ends[0], ends[-1] + 1))
    return indices


def _as_number(text: str) -> str | int | float:
    """The number that a text spells, or the text."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _saved(path) -> str | Path | None:
    """The file of a saved plan. A name without a file stands for a plan that ships. None: there is neither."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    own = os.path.expanduser(path)
    return own if os.path.isfile(own) else _shipped().get(str(path))


def version_of(path) -> tuple[int, int, int] | None:
    """What tells a saved plan's file from other files, and from itself before a change. None: there is no such file."""
    file = _saved(path)
    if file is None:
        return None
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _shipped() -> dict[str, Path]:
    """The plans that ship with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.plan"))}


def _checked_layers(layers) -> tuple[int, ...]:
    try:
        indices = sorted(check_count("a layer index", layer, 0, error=PlanError) for layer in layers)
    except TypeError:
        raise PlanError(f"layers is {layers!r}; give indices, as in layers=(20, 21)") from None
    if len(set(indices)) < len(indices):
        raise PlanError(f"layers names a layer twice: {tuple(indices)}")
    return tuple(indices)


def _copied(about) -> dict:
    """A copy of a plan's record, as its file would give it back."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        if isinstance(about, dict) and len(text := json.dumps(about, allow_nan=False)) <= RECORD:
            return json.loads(text)
    raise PlanError(f"about is {about!r:.80}; give a dict that JSON can hold in {RECORD:,} characters")


def _share(name: str, value, of_what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise PlanError(f"{name} is {value!r}; it is the share of {of_what}, from 0 to 1")
    return float(value)


def _floor(number: float) -> int:
    """The small term keeps 100 * 0.29 = 28.999999999999996 from losing one."""
    return math.floor(number + 1e-9)
