"""Importance scores: `pop.importance`, from samples to scores, and what can be done with the scores.

pop/calibration/gates.py explains what they mean, and computes the gradients. This file reads samples as users give
them, lets the model sample the responses that are missing, and keeps unfinished work in a file.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from pop.calibration.distill import check_gradients
from pop.calibration.gates import gate_gradients, sample_responses
from pop.calibration.record import Record
from pop.errors import InputError, PlanError, PopError, UnsupportedError, check_count, import_extra
from pop.generation.batch import as_prompts
from pop.inputs.processors import Prepared
from pop.model import Model
from pop.pruning.plan import PrunePlan
from pop.system import files
from pop.system.progress import progress_bar

# A prompt, its response (None: the model samples one), and the prompt's images and videos.
Sample = tuple[list[int], list[int] | None, list[Prepared]]
SCORES = ("prefill", "decode", "prefill_error", "decode_error")


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """Importance scores of all layers for both stages, made by `pop.importance`. Invalid values raise InputError."""

    prefill: torch.Tensor  # [L] float64 on the CPU, in nats squared (README.md in this folder)
    decode: torch.Tensor
    prefill_error: torch.Tensor  # standard errors [L] float64; all NaN for a single sample
    decode_error: torch.Tensor
    num_samples: int  # the scores are means over these
    attention: "Importance | None" = None  # scores of this branch of each layer, if asked for (branches=True)
    mlp: "Importance | None" = None

    def __post_init__(self):
        object.__setattr__(self, "num_samples", check_count("num_samples", self.num_samples))
        for name in SCORES:
            unknown = name.endswith("_error") and self.num_samples == 1
            object.__setattr__(self, name, _scores(name, getattr(self, name), unknown))
        branches = [branch for branch in (self.attention, self.mlp) if branch is not None]
        if not all(isinstance(branch, Importance) for branch in branches):
            raise InputError("attention and mlp must be an Importance each, or None")
        numbers = {(self.num_samples, len(getattr(self, name))) for name in SCORES}
        numbers |= {(branch.num_samples, len(branch.prefill)) for branch in branches}
        if len(numbers) > 1:
            raise InputError(f"the scores differ in (samples, layers): {sorted(numbers)}; give scores of one run")

    def plan(self, count: int, **options) -> PrunePlan:
        """Prune the `count` layers that prefill needs least. Of equal layers, prune the deeper one first.

        `options` are the other fields of PrunePlan. Raises PlanError if a value is out of range.
        """
        num_layers = len(self.prefill)
        count = check_count("count", count, 0, num_layers, PlanError)
        ranked = sorted(range(num_layers), key=lambda layer: (self.prefill[layer].item(), -layer))
        return PrunePlan(layers=tuple(ranked[:count]), **options)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw both stages' scores over the layers, with standard errors, as an SVG or PNG file.

        The axis is logarithmic. A triangle on the lower edge stands for a score of exactly zero. Raises MissingExtra
        without matplotlib, and InputError for another kind of file or one that cannot be written.
        """
        kind = check_plot(path)
        from matplotlib import style
        from matplotlib.figure import Figure

        layers = np.arange(len(self.prefill))
        positive = torch.cat((self.prefill, self.decode))
        positive = positive[positive > 0].tolist()
        with style.context(["default", {"svg.hashsalt": "pop"}]):  # equal scores give equal files
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
            axes.set(xlabel="layer", ylabel="importance, nats²")
            axes.set_title(f"Virtual gates: mean of {self.num_samples} samples, with standard errors", fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend()
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        files.write_whole(path, drawn.getvalue(), "the plot", InputError)

    def save(self, path: str | os.PathLike) -> None:
        """Write the scores as JSON, whole or not at all. Raises InputError if that fails."""

        def listed(scores: torch.Tensor) -> list:
            return [None] * len(scores) if scores.isnan().any() else scores.tolist()

        content = json.dumps(dataclasses.asdict(self), indent=1, default=listed) + "\n"
        files.write_whole(path, content, "the importance scores", InputError)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read scores that `save` has written. Raises InputError for any other file."""
        try:
            fields = files.read_json(path, InputError)
            for name in ("attention", "mlp"):
                if isinstance(fields.get(name), dict):
                    fields[name] = cls(**fields[name])
            return cls(**fields)
        except (InputError, TypeError) as error:
            raise InputError(f"{path} does not hold importance scores ({error}); write them with .save(path)") from None


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
    """Score how much each stage needs each layer, by virtual gates (pop/calibration/gates.py).

    Args:
        model: A pop.Model. The full model is scored, whatever its plan is.
        samples: Prompts, as texts or token ids, or pairs (prompt, response). The model samples the missing responses,
            at full depth and temperature 1.
        images, videos: A list for each sample's prompt, as in `Model.generate`. All are in memory at the same time.
        response_tokens: The most tokens of a sampled response. An end token ends it earlier, and counts in the loss.
        batch_size: How many samples run at once. It changes speed, memory and rounding only.
        seed: Sample i has a random generator seeded with (seed, i).
        branches: Also score attention and MLP separately.
        resume: A file that keeps unfinished work. If it exists, the run continues from it.
        progress: Show a bar on stderr, if tqdm is installed.

    Raises:
        InputError, ContextOverflow, TokenizerError: A sample or an option cannot be used, the resume file belongs to
            another run, or numbers overflow.
        UnsupportedError: Several processes share the model.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
    if model.part is not None:
        raise UnsupportedError("importance does not run in several processes; load the model in one process")
    check_gradients(model)
    response_tokens = check_count("response_tokens", response_tokens)
    batch_size = check_count("batch_size", batch_size)
    seed = check_count("seed", seed, least=0, most=2**63 - 1)
    if not isinstance(branches, bool):
        raise InputError(f"branches is {branches!r}; it must be True or False")
    samples = _parse(model, samples, images, videos, response_tokens)
    gates = 3 if branches else 1  # the whole layer, attention, the MLP
    scores = torch.zeros(0, gates, 2, len(model.module.layers), dtype=torch.float64)  # [samples, gates, stages, L]
    if resume is not None:
        hashed = repr([(prompt, response, [one.sha256 for one in media]) for prompt, response, media in samples])
        run = {
            "model": f"{model.config} {model.dtype} {model.fingerprint}",
            "samples": hashlib.sha256(hashed.encode()).hexdigest(),
            "response_tokens": str(response_tokens),
            "seed": str(seed),
            "branches": str(branches),
        }
        record = Record(resume, run)
        for kept in record.read(["scores"]):
            fits = (kept.dtype, kept.shape[1:]) == (scores.dtype, scores.shape[1:]) and len(kept) <= len(samples)
            if not fits or not (kept.isfinite() & (kept >= 0)).all():
                raise InputError(f"{resume} is not the record of such a run: its scores are broken; remove it")
            scores = kept
        record.write({"scores": scores})  # before the work, in case the path cannot be written
    with progress_bar("importance", len(samples), "samples", progress) as step:
        step(len(scores))
        for begin in range(len(scores), len(samples), batch_size):
            prompts, responses, media = map(list, zip(*samples[begin : begin + batch_size], strict=True))
            rows = [row for row, response in enumerate(responses) if response is None]
            seeds = [(seed, begin + row) for row in rows]
            sampled = sample_responses(
                model, [prompts[row] for row in rows], [media[row] for row in rows], seeds, response_tokens
            )
            for row, response in zip(rows, sampled, strict=True):
                responses[row] = response
            gradients = gate_gradients(model, prompts, responses, media)  # [B, 2, 2, L]
            # A gate on the whole layer multiplies both branches, so its derivative is the sum of theirs.
            whole = gradients.sum(1, keepdim=True)
            scores = torch.cat((scores, torch.cat((whole, gradients), dim=1)[:, :gates].square()))
            if resume is not None:
                record.write({"scores": scores})
            step(len(prompts))
    mean, n = scores.mean(0), len(scores)
    error = ((scores - mean).square().sum(0) / (n - 1) / n).sqrt()  # NaN for one sample
    whole, *apart = (Importance(*mean[gate], *error[gate], n) for gate in range(gates))
    return dataclasses.replace(whole, **dict(zip(("attention", "mlp"), apart, strict=False)))


def _parse(model, samples, images, videos, response_tokens: int) -> list[Sample]:
    """Encode the samples, and check that each fits the model's context."""
    if isinstance(samples, (str, bytes, dict)) or not isinstance(samples, Iterable):
        raise InputError(f"samples is a {type(samples).__name__}; give a list of prompts, or of (prompt, response)")
    samples, parsed = list(samples), []
    rows = model.vision.prepare_batch(images, videos, len(samples))
    for number, (sample, media) in enumerate(zip(samples, rows, strict=True)):
        try:
            # Two token ids are a prompt.
            is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2 and as_prompts(sample)[1]
            prompt, response = sample if is_pair else (sample, None)
            prompt = model.encode(prompt, media=media)
            response = None if response is None else model.encode(response, "response", bos=False)
            count = response_tokens if response is None else len(response)
            model.check_fits(len(prompt) + count - 1, "prompt plus response")
        except PopError as error:
            raise type(error)(f"sample {number} cannot be used: {error}") from None
        parsed.append((prompt, response, media))
    if not parsed:
        raise InputError("samples is empty; give at least one prompt")
    return parsed


def check_plot(path: str | os.PathLike) -> str:
    """Return "svg" or "png", the kind of plot to write to a path. Raises InputError for others, or MissingExtra."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise InputError(f"the plot cannot be written as {path}; give a path that ends in .svg or .png")
    import_extra("matplotlib", "matplotlib", "plot")
    return kind


def _scores(name: str, values, unknown: bool) -> torch.Tensor:
    """values as [L] float64: finite and at least 0, or all NaN if `unknown` (None in a file). Raises InputError."""
    values = values.tolist() if hasattr(values, "tolist") else values

    def valid(value) -> bool:
        return value is None or value != value if unknown else type(value) in (int, float) and 0 <= value < math.inf

    if not isinstance(values, (list, tuple)) or not values or not all(map(valid, values)):
        wanted = "NaN for each layer, since there is one sample" if unknown else "a number of at least 0 for each layer"
        raise InputError(f"{name} is {values!r:.80}; it must be a list of {wanted}")
    return torch.tensor([math.nan if unknown else value for value in values], dtype=torch.float64)
