"""Which layers does each stage need? `pop.importance`, from samples to scores, and what can be done with them.

The mechanism, and what the scores mean, is in pop/calibration/gates.py. Around it: samples as users give them, responses that
the model samples itself, and sums that survive an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from pop.calibration.gates import gate_gradients, sample_responses
from pop.errors import InputError, MissingExtra, PlanError, PopError, UnsupportedError, check_count
from pop.files import replaced
from pop.inputs.processors import Prepared
from pop.model import Model
from pop.progress import progress_bar
from pop.pruning.plan import PrunePlan


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """Importance scores of all layers for both stages, made by `pop.importance`.

    prefill, decode: [L] float64 on the CPU, I_l of pop/calibration/gates.py, in nats squared.
    prefill_error, decode_error: [L] float64, their standard errors; nan where there was one sample only.
    num_samples: how many samples the scores are means of.
    attention, mlp: the same with a gate on that branch of the layer alone, or None where it was not asked for.

    Raises InputError for anything else.
    """

    prefill: torch.Tensor
    decode: torch.Tensor
    prefill_error: torch.Tensor
    decode_error: torch.Tensor
    num_samples: int
    attention: Importance | None = None
    mlp: Importance | None = None

    def __post_init__(self):
        object.__setattr__(self, "num_samples", check_count("num_samples", self.num_samples))
        for name in ("prefill", "decode", "prefill_error", "decode_error"):
            unknown = name.endswith("error") and self.num_samples == 1
            object.__setattr__(self, name, _scores(name, getattr(self, name), unknown))
        branches = [branch for branch in (self.attention, self.mlp) if branch is not None]
        if not all(isinstance(branch, Importance) for branch in branches):
            raise InputError("attention and mlp are an Importance each, or None")
        lists = [self.prefill, self.decode, self.prefill_error, self.decode_error]
        lists += [branch.prefill for branch in branches]
        if len({len(scores) for scores in lists}) > 1 or any(b.num_samples != self.num_samples for b in branches):
            raise InputError("the scores are of different numbers of layers or samples; they belong together")

    def plan(self, count: int, **options) -> PrunePlan:
        """Prune the `count` layers that matter least for prefill; of equal ones the deeper first.

        options: the other fields of PrunePlan. Raises PlanError for a count that is not 0 to L.
        """
        num_layers = len(self.prefill)
        if isinstance(count, bool) or not isinstance(count, Integral) or not 0 <= count <= num_layers:
            raise PlanError(f"count is {count!r}; it is the number of layers to prune, from 0 to {num_layers}")
        ranked = sorted(range(num_layers), key=lambda layer: (self.prefill[layer].item(), -layer))
        return PrunePlan(layers=tuple(ranked[:count]), **options)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw both stages' scores over the layers, with standard errors, as an SVG or PNG file.

        A score of exactly zero has no place on the logarithmic axis: a triangle on the lower edge stands for it.
        Raises MissingExtra without matplotlib, InputError for another kind of file or one that cannot be written.
        """
        kind = check_plot(path)
        import matplotlib
        from matplotlib.figure import Figure

        layers = np.arange(len(self.prefill))
        positive = torch.cat((self.prefill, self.decode))
        positive = positive[positive > 0].tolist()
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams["svg.hashsalt"] = "pop"  # the same scores give the same file
            figure = Figure(figsize=(7, 3.6), layout="constrained")
            axes = figure.add_subplot()
            for stage, color, marker in (("prefill", "tab:blue", "o"), ("decode", "tab:orange", "s")):
                scores, errors = getattr(self, stage).numpy(), getattr(self, f"{stage}_error").numpy()
                shown, zeros = np.where(scores > 0, scores, np.nan), layers[scores == 0]
                axes.errorbar(layers, shown, errors, color=color, marker=marker, ms=4, lw=1, capsize=2, label=stage)
                axes.plot(zeros, 0.03 + 0 * zeros, "v", color=color, ms=4, transform=axes.get_xaxis_transform())
            axes.set_yscale("log", nonpositive="clip")
            if positive:
                axes.set_ylim(min(positive) / 3, max(positive) * 3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("layer")
            axes.set_ylabel("importance, nats²")
            axes.set_title(f"Virtual gates: mean of {self.num_samples} samples, with standard errors", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend()
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        _write(path, drawn.getvalue())

    def save(self, path: str | os.PathLike) -> None:
        """Write the scores as JSON, whole or not at all. Raises InputError where that is not possible."""
        _write(path, _json(self._fields()))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Importance:
        """Read scores written by `save`. Raises InputError if the file does not hold them."""
        try:
            return cls._from_fields(_read_json(path))
        except (InputError, OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{path} does not hold importance scores ({error}); write them with .save(path)") from None

    def _fields(self) -> dict:
        fields = dict(vars(self))
        for name, value in fields.items():
            if isinstance(value, Importance):
                fields[name] = value._fields()
            elif isinstance(value, torch.Tensor):
                fields[name] = [None if math.isnan(number) else number for number in value.tolist()]
        return fields

    @classmethod
    def _from_fields(cls, fields: dict) -> Importance:
        inner = {name: cls._from_fields(value) for name, value in fields.items() if isinstance(value, dict)}
        return cls(**{**fields, **inner})


def importance(
    model,
    samples: Iterable,
    *,
    images=None,
    videos=None,
    response_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    branches: bool = False,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> Importance:
    """How much each stage needs each layer, by virtual gates (see pop/calibration/gates.py).

    model: a pop.Model; its plan plays no part, and its parameters are left as they are.
    samples: prompts, each a text or token ids (model.chat_tokens(...), say), to which the model samples a response at
        full depth and temperature 1; or pairs (prompt, response) with a response to take instead.
    images, videos: a list for each sample, what its prompt has of them, as in `Model.generate`. All are prepared at
        once, and so in memory together.
    response_tokens: the longest response that is sampled; an end token ends it before, and counts in the loss.
    batch_size: samples in memory together. It changes speed and memory, and the scores only as rounding does.
    seed: sample number i has a random generator of its own, made of (seed, i).
    branches: score attention and MLP apart as well: Importance.attention, Importance.mlp.
    resume: a file to keep the sums in while the batches are done, and to go on from if it is there.
    progress: show a bar on stderr, if tqdm is installed.

    Raises InputError (ContextOverflow, TokenizerError) for a sample or an option that cannot be used, for a resume
    file of another run, and where numbers overflow.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
    if model.part is not None:
        raise UnsupportedError("virtual gates are not differentiated across processes; load the model in one process")
    if any(parameter.is_inference() for parameter in model.module.parameters()):
        raise InputError("the model was loaded under torch.inference_mode, which rules out gradients; load it outside")
    response_tokens = check_count("response_tokens", response_tokens)
    batch_size = check_count("batch_size", batch_size)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed!r}; it must be an integer from 0 to 2**63 - 1")
    if not isinstance(branches, bool):
        raise InputError(f"branches is {branches!r}; it must be True or False")
    samples = _parse(model, samples, images, videos, response_tokens)
    gates = ("layer", "attention", "mlp") if branches else ("layer",)
    record = _Record(torch.zeros(len(gates), 2, len(model.module.layers), dtype=torch.float64))
    if resume is not None:
        settings = {"response_tokens": response_tokens, "seed": int(seed), "branches": branches}
        run = {
            "model": f"{model.config} {model.dtype} {model.fingerprint}",
            "samples": _sha256(_json([(*texts, [one.sha256 for one in seen]) for *texts, seen in samples])),
            **settings,
        }
        record.load(resume, run, len(samples))
        record.save(resume, run)  # now: a path that cannot be written is better known at once
    with progress_bar("importance", len(samples), "samples", progress) as step:
        step(record.count)
        for begin in range(record.count, len(samples), batch_size):
            batch = samples[begin : begin + batch_size]
            numbers = [begin + row for row, (_, response, _) in enumerate(batch) if response is None]
            asking, seeds = [samples[number] for number in numbers], [(seed, number) for number in numbers]
            told = [prompt for prompt, _, _ in asking], seeds, response_tokens, [seen for *_, seen in asking]
            sampled = iter(sample_responses(model, *told))
            prompts, given, seen = map(list, zip(*batch, strict=True))
            responses = [next(sampled) if response is None else response for response in given]
            images_of = partial(model.vision.images, model.module, seen) if any(seen) else None
            gradients = gate_gradients(model.module, prompts, responses, images_of)  # [B, 2, 2, L]
            # A gate on the whole layer multiplies both branches: its derivative is the sum of theirs.
            whole = gradients.sum(1, keepdim=True)
            for score in torch.cat((whole, gradients), 1)[:, : len(gates)].square():
                record.add(score)
            if resume is not None:
                record.save(resume, run)
            step(len(batch))
    means, errors = record.mean, record.standard_error()
    layer, *branch = (
        Importance(mean[0], mean[1], error[0], error[1], record.count)
        for mean, error in zip(means, errors, strict=True)
    )
    return dataclasses.replace(layer, **dict(zip(gates[1:], branch, strict=True)))


def _parse(
    model, samples, images, videos, response_tokens: int
) -> list[tuple[list[int], list[int] | None, list[Prepared]]]:
    """Every sample as token ids (prompt, response) and what its prompt has of images and videos.

    The response is None where it is to be sampled.
    """
    if isinstance(samples, (str, bytes, dict)) or not isinstance(samples, Iterable):
        raise InputError(f"samples is a {type(samples).__name__}; give a list of prompts, or of (prompt, response)")
    samples, parsed = list(samples), []
    rows = model.vision.prepare_batch(images, videos, len(samples))
    for number, (sample, seen) in enumerate(zip(samples, rows, strict=True)):
        try:
            prompt, response = sample if _is_pair(sample) else (sample, None)
            prompt = model.encode(prompt, seen=seen)
            response = None if response is None else model.encode(response, "response", bos=False)
            count = response_tokens if response is None else len(response)
            model.check_fits(len(prompt) + count - 1, "prompt plus response")
        except PopError as error:
            raise type(error)(f"sample {number} cannot be used: {error}") from None
        parsed.append((prompt, response, seen))
    if not parsed:
        raise InputError("samples is empty; give at least one prompt")
    return parsed


def _is_pair(sample) -> bool:
    """Whether a sample is (prompt, response), rather than the ids of two tokens."""
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        return False
    return isinstance(sample[0], (str, Sequence)) or getattr(sample[0], "ndim", 0) > 0


class _Record:
    """Mean and squared deviations of the scores so far (Welford 1962), float64; kept in a file between batches."""

    def __init__(self, zeros: torch.Tensor):
        self.count, self.mean, self.squares = 0, zeros, zeros.clone()

    def add(self, score: torch.Tensor) -> None:
        self.count += 1
        deviation = score - self.mean
        self.mean = self.mean + deviation / self.count
        self.squares = self.squares + deviation * (score - self.mean)

    def standard_error(self) -> torch.Tensor:
        """Of the mean: the samples' standard deviation over sqrt(count); nan for one sample."""
        if self.count == 1:
            return torch.full_like(self.mean, math.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()

    def save(self, path, run: dict) -> None:
        sums = {"mean": self.mean.tolist(), "squares": self.squares.tolist()}
        _write(path, _json({"run": run, "count": self.count, **sums}))

    def load(self, path, run: dict, num_samples: int) -> None:
        """Take what the file at `path` holds, if there is one. Raises InputError unless it belongs to `run`."""
        if not os.path.exists(path):
            return
        advice = "give another path, or remove the file to start anew"
        try:
            fields = _read_json(path)
            saved, count, mean, squares = (fields.pop(name) for name in ("run", "count", "mean", "squares"))
            other = [name for name in run if saved[name] != run[name]]
            if other:
                raise InputError(f"{path} belongs to a run with another {' and another '.join(other)}; {advice}")
            sums = torch.tensor([mean, squares], dtype=torch.float64)
            whole = fields == {} and type(count) is int and 0 <= count <= num_samples
            if not whole or sums[0].shape != self.mean.shape or not (sums.isfinite() & (sums >= 0)).all():
                raise ValueError("its fields contradict each other")
            self.count, (self.mean, self.squares) = count, sums
        except InputError:
            raise
        except (OSError, LookupError, ValueError, TypeError, RuntimeError, RecursionError) as error:
            raise InputError(f"{path} is not the record of an importance run ({error!r}); {advice}") from None


def check_plot(path: str | os.PathLike) -> str:
    """Return the kind of file that `plot` would write, "svg" or "png". Raises InputError or MissingExtra if none."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise InputError(f"the plot cannot be written as {path}; give a path that ends in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("a plot needs the package matplotlib; run `pip install 'pop-prefill[plot]'`") from None
    return kind


def _scores(name: str, values, unknown: bool) -> torch.Tensor:
    """values as [L] float64: finite and not negative, or all nan (None) where they are unknown. Raises InputError."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not values:
        raise InputError(f"{name} is {values!r:.80}; it is a list of one number a layer")
    for value in values:
        is_unknown = value is None or value != value
        if unknown != is_unknown or not (unknown or (type(value) in (int, float) and 0 <= value < math.inf)):
            raise InputError(f"{name} holds {value!r:.80}, which is no mean of squares, nor the standard error of one")
    return torch.tensor([math.nan if unknown else value for value in values], dtype=torch.float64)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_json(path) -> dict:
    value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _write(path, data: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        with replaced(path) as draft:
            draft.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another path") from None
