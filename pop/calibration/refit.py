"""Calibration: refit the K and V projections of pruned layers in closed form.

A pruned layer projects K and V from an earlier state than its weights were trained on. Much of the resulting error is
linear. Ridge regression toward the layer's own projection W0 removes it:

    min_W  sum_t |y_t - b0 - W x_t|^2 + lambda n |W - W0|^2
    W = W0 + d D,   D = R' X (X' X + lambda n I)^-1,   R = Y - b0 - X W0',   d = 1

x_t is the normalised state of token t, and y_t the full model's K or V of it. Held-out windows choose lambda and the
damping d. README.md in this folder derives this.
"""

import dataclasses
import functools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from pop.calibration.distill import check_gradients, distill, working_copy
from pop.calibration.judge import JUDGED, PASSAGE, Judge, Window
from pop.engine.compile import SMALLEST
from pop.errors import InputError, PlanError, UnsupportedError, check_count
from pop.generation.sampling import check_finite
from pop.model import Model
from pop.pruning.plan import PrunePlan
from pop.pruning.projections import KVProjections
from pop.system import __version__
from pop.system.progress import progress_bar

RIDGES = (1e-2, 1e-1, 1.0)  # candidates for lambda
DAMPINGS = (1.0, 0.85)  # candidates for d, of V only: damping K gains nothing (tools/evaluate/README.md)
TRIALS = len(RIDGES) + len(DAMPINGS)  # the most settings (lambda, dampings) that are tried for a plan
SHORTEST = 16  # tokens; a shorter window is left out
TOKENS_AT_ONCE = 4096  # the most tokens in one forward pass
LENGTHS = (512, 2048, 8192)  # prompt lengths for which a plan records its speedup


@torch.no_grad()
def calibrate(
    model: Model,
    texts: Sequence[str | Sequence[int]] | None,
    plan: PrunePlan | Sequence[PrunePlan],
    *,
    images=None,
    videos=None,
    taps: int = 2,
    rank: int | None = None,
    window: int = 1024,
    held_out: int = 8,
    steps: int = 0,
    resume: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PrunePlan | list[PrunePlan]:
    """Refit the pruned layers' K and V projections to texts.

    Args:
        model: A pop.Model.
        texts: Strings or lists of token ids that resemble the prompts to come. Some 50,000 tokens suffice; a wide model
            needs more. None takes a small built-in set of English and Python.
        plan: A PrunePlan or another value of `prune` in `load`, or a list. Several plans share the pass over the texts.
        images, videos: A list for each text, as in `Model.generate`. All are in memory at the same time.
        taps: 2 also gives the projections the previous token, and 1 does not.
        rank: Store corrections of this rank in all, such as a quarter of taps * D, for one group of pruned layers. The
            plan is smaller, and two taps cost less. None: whole projections.
        window: The tokens of a window, ideally as many as in a typical prompt. Texts with images stay whole.
        held_out: The number of windows, at most a fifth of all, that choose lambda and the damping but are not fitted.
            A plan is judged by the 128 tokens after their first 256, or after their last image, and by a passage of
            these 256 that is repeated after them.
        steps: Steps of distillation after the closed form (distill.py), such as 150. 0: none.
        resume: A file that keeps the unfinished work of these steps. If it exists, they continue from it.
        seed: Decides which windows are held out, and what the steps train on.
        progress: Show a bar on stderr, if tqdm is installed.

    Returns:
        The plan with projections, and with a full_depth_first of at least 1. For a list of plans, a list. Its `about`
        records the model, the texts, the options and the loss on held-out windows.

    Raises:
        InputError: The texts are too short, or an option is out of range.
        PlanError: A plan does not fit the model, or prunes nothing.
        UnsupportedError: Several processes share the model, and steps is not 0.
    """
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
    several = isinstance(plan, (list, tuple))
    plans = [_checked(model, one) for one in (plan if several else [plan])]
    if not plans:
        raise PlanError("the list of plans is empty; give at least one plan")
    taps = check_count("taps", taps, least=1, most=2)
    if rank is not None:
        rank = check_count("rank", rank, least=1, most=taps * model.config.hidden_size)
    seed = check_count("seed", seed, least=-(2**63), most=2**63 - 1)
    window = min(check_count("window", window, least=SHORTEST), model.max_seq_len)
    held_out = check_count("held_out", held_out)
    steps = check_count("steps", steps, least=0)
    if steps and model.part is not None:
        raise UnsupportedError(f"steps is {steps}, but distillation works in one process only; give 0, or one process")
    if resume is not None and (not steps or len(plans) > 1):
        raise InputError(f"resume keeps the steps for one plan, but {steps} steps and {len(plans)} plans are given")
    if steps:
        check_gradients(model)
    if resume is not None and not (isinstance(resume, str | os.PathLike) and Path(resume).expanduser().parent.is_dir()):
        raise InputError(f"resume is {resume!r:.200}, which cannot be written; give a file in a folder that exists")
    texts = _texts(texts)
    windows = text_windows(model, texts, images, videos, window)
    if len(windows) < 2:
        needed = f"calibration needs two windows of {SHORTEST} to {window} tokens, but the texts have {len(windows)}"
        raise InputError(f"{needed}; give several texts, {window + SHORTEST} tokens in one text, or a smaller window")
    random.Random(seed).shuffle(windows)
    held_out = min(held_out, max(1, len(windows) // 5))
    judge, windows = windows[:held_out], windows[held_out:]
    fits = [_Fit(model, one, taps, rank, bool(steps)) for one in plans]
    # Passes in bfloat16 leave the loss as it is. A small model, or a part of one, need not be copied.
    module = working_copy(model) if model.num_parameters >= SMALLEST and model.part is None else model.module
    trial = sum(min(len(tokens), JUDGED) + PASSAGE for tokens, _ in judge)  # tokens that judging a plan runs
    total = sum(len(tokens) for tokens, _ in windows) + len(fits) * TRIALS * trial
    with progress_bar("calibrating", total, "tokens", progress) as step:
        for batch in _batches(windows):
            _accumulate(model, batch, fits, module)
            step(sum(len(tokens) for tokens, _ in batch))
        if not all(fit.count for fit in fits):
            raise InputError("full_depth_first leaves no token to fit to; make it smaller, or give longer texts")
        del module
        loss = Judge(model, judge, plans)
        results = [_choose(fit, loss, lambda trials: step(trials * trial)) for fit in fits]
    if steps:
        with progress_bar("distilling", len(fits) * steps, "steps", progress) as step:
            results = [distill(model, result, windows, loss, steps, seed, resume, step) for result in results]
    tokens = sum(len(tokens) for tokens, _ in windows)
    about = {"texts": len(texts), "windows": len(windows), "held_out": held_out, "window": window, "tokens": tokens}
    results = [_recorded(model, one, loss, about | {"steps": steps, "seed": seed}) for one in results]
    return results if several else results[0]


def builtin_texts() -> list[str]:
    """The texts for texts=None: public-domain English of five kinds, and some Python of this package."""
    folder = files("pop").joinpath("data", "calibration")
    return [file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=lambda file: file.name)]


def _checked(model, plan) -> PrunePlan:
    plan = PrunePlan.of(plan, model.config.num_layers)
    if not plan.layers:
        raise PlanError("the plan prunes no layers, so there is nothing to calibrate; give its layers")
    return dataclasses.replace(plan, full_depth_first=max(1, plan.full_depth_first), projections=None)


def _texts(texts) -> list:
    if isinstance(texts, str) or not isinstance(texts, Iterable | None):
        raise InputError(f"texts is a {type(texts).__name__}; give a list of strings or of lists of token ids")
    return builtin_texts() if texts is None else list(texts)


def text_windows(model, texts, images, videos, size: int) -> list[Window]:
    """Cut the texts into windows of at most `size` token ids. Where a text begins with BOS, so do its windows."""
    windows = []
    for text, media in zip(texts, model.vision.prepare_batch(images, videos, len(texts)), strict=True):
        if isinstance(text, int):
            raise InputError(f"texts holds {text}; give strings or lists of token ids")
        tokens = model.encode(text, "text", media=media)
        if media:
            model.check_fits(len(tokens), "a text with images", media)
            windows.append((tokens, media))
            continue
        bos = tokens[:1] if tokens[0] == model.config.bos_id else []
        step = max(1, size - len(bos))
        windows += [(bos + tokens[begin : begin + step], []) for begin in range(len(bos), len(tokens), step)]
    return [(tokens, media) for tokens, media in windows if len(tokens) >= SHORTEST]


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Batch windows of similar lengths, as many as TOKENS_AT_ONCE allows."""
    queue = iter(sorted(windows, key=lambda window: len(window[0]), reverse=True))
    while first := next(queue, None):
        yield [first, *islice(queue, max(0, TOKENS_AT_ONCE // len(first[0]) - 1))]


class _Fit:
    """The normal equations of one plan."""

    def __init__(self, model, plan: PrunePlan, taps: int, rank: int | None = None, keep_taps: bool = False):
        self.model, self.plan, self.taps, self.rank, self.keep_taps = model, plan, taps, rank, keep_taps
        self.count = 0  # n, the number of tokens
        groups = plan.groups(model.config.num_layers, model.module.deepstack_layers)
        self.groups = [group for is_pruned, group in groups if is_pruned]
        if rank is not None and len(self.groups) > 1:
            raise PlanError(
                f"rank is {rank}, but {plan.layers} are {len(self.groups)} groups of layers; prune one group"
            )
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=model.device)
        width, KE = taps * model.config.hidden_size, model.module.config.num_kv_heads * model.config.head_dim
        self.xx = {group[0]: zeros(width, width) for group in self.groups}  # X' X, by the first layer of a group
        self.x = {group[0]: zeros(width) for group in self.groups}  # the sum of X over the tokens, likewise
        self.xy = {index: zeros(width, 2 * KE) for index in plan.layers}  # X' Y, by pruned layer

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """W0 [n, 2, K * E, taps * D], D of the same shape, b0 [n, 2, K * E], and L of the last group, in float64.

        ridge: lambda. L [taps * D, taps * D] is the Cholesky factor of X' X / n + lambda I.
        """
        solutions = []
        for group in self.groups:
            xx, x = self.xx[group[0]], self.x[group[0]]
            for sums in (xx, *(self.xy[index] for index in group)):
                check_finite(sums, "hidden states of the texts")
            identity = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
            factor = torch.linalg.cholesky(xx + ridge * self.count * identity)
            for index in group:
                own, bias = self.model.module.layers[index].folded_projections()
                own = F.pad(own, (0, len(xx) - own.shape[2]))  # the layer's own projection ignores the previous token
                residual = self.xy[index] - xx @ own.flatten(0, 1).T - x[:, None] * bias.flatten()  # X' R
                correction = torch.cholesky_solve(residual, factor)  # D'
                solutions.append((own, correction.T.unflatten(0, own.shape[:2]), bias))
        own, correction, bias = map(torch.stack, zip(*solutions, strict=True))
        return own, correction, bias, factor / self.count**0.5

    def refit(self, own, correction, bias, factor, damp_k: float, damp_v: float) -> PrunePlan:
        """Return the plan with the projections of a solution, given the dampings of K and V."""
        taps, shared = self.taps, None
        # Plain pruning does not use the previous token.
        if damp_k == damp_v == 0 and self.rank is None and not self.keep_taps:
            taps, D = 1, self.model.config.hidden_size
            own, correction = own[..., :D], correction[..., :D]
        correction = own.new_tensor([damp_k, damp_v])[:, None, None] * correction
        weight = own + correction if self.rank is None else correction
        if self.model.part is not None:  # each process has fitted those of its heads
            weight, bias = (self.model.part.gather_heads(x) for x in (weight, bias))
        if self.rank is not None:
            weight, shared = low_rank(weight, factor, self.rank)
            bias, shared = torch.zeros_like(bias), shared.to(self.model.dtype)
        weight, bias = weight.to(self.model.dtype), bias.to(self.model.dtype)
        projections = KVProjections(self.plan.layers, weight, bias, self.model.fingerprint, taps, shared)
        return dataclasses.replace(self.plan, projections=projections)


def low_rank(corrections: torch.Tensor, factor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The U [n, 2, K * E, R] and V [R, taps * D] that minimise the sum of |(D_l - U_l V) L|² over all layers.

    So they change K and V of the calibration text least. V x has a mean square of about 1.

    Args:
        corrections: D [n, 2, K * E, taps * D].
        factor: L [taps * D, taps * D], lower triangular. L L' is the mean of x x', plus lambda.
        rank: R.
    """
    scaled = corrections @ factor
    rows = scaled.flatten(0, 2)
    basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -rank:]  # of the largest eigenvalues
    shared = torch.linalg.solve_triangular(factor, basis.T, upper=False, left=False)
    return scaled @ basis, shared.contiguous()


def _accumulate(model, batch: list[Window], fits: list[_Fit], module=None) -> None:
    """Add the tokens of a batch of windows to the sums of each fit.

    One full forward pass gives the targets. Beside it, each plan has a stream from its first to its last pruned layer,
    in which tokens skip the plan's layers. The first tokens run at full depth, and are not fitted to.

    module: Runs in place of the model's own.
    """
    module = model.module if module is None else module
    lengths = torch.tensor([len(tokens) for tokens, _ in batch])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in batch], batch_first=True)
    images = model.vision.images(module, [media for _, media in batch], tokens, lengths)
    position = torch.arange(tokens.shape[1], device=model.device)
    inside = position < lengths.to(model.device)[:, None]  # [B, T], not padding
    fitted = [inside & (position >= fit.plan.full_depth_first) for fit in fits]  # [B, T] each
    deepest = max(fit.plan.layers[-1] for fit in fits)  # no layer after it is run
    streams, inputs = {}, {}  # by number of the fit: h [B, T, D], and X [N, taps * D] of the group

    def step(index, layer, h, rope, attend):
        full = layer(h, rope, attend) if index < deepest else h
        targets = torch.cat(layer.projected(h), dim=-1) if any(index in fit.xy for fit in fits) else None
        for number, fit in enumerate(fits):
            first, last = fit.plan.layers[0], fit.plan.layers[-1]
            if not first <= index <= last:
                continue
            stream = h if index == first else streams[number]
            if index in fit.xx:
                x = layer.normalised(stream)
                x = torch.cat((x, F.pad(x, (0, 0, 1, -1))), dim=-1) if fit.taps == 2 else x
                X = inputs[number] = x[fitted[number]].double()
                fit.xx[index] += X.T @ X
                fit.x[index] += X.sum(0)
            if index in fit.xy:
                fit.xy[index] += inputs[number].T @ targets[fitted[number]].double()
                stream = torch.where((position < fit.plan.full_depth_first)[:, None], full, stream)
            else:
                stream = layer(stream, rope, attend)
            streams[number] = images.add_deepstack(stream, index)
        return full

    module.through_layers(tokens.to(model.device), images, step)
    for fit, mask in zip(fits, fitted, strict=True):
        fit.count += int(mask.sum())


def _choose(fit: _Fit, judge: Judge, step) -> PrunePlan:
    """Choose lambda, then the damping of V, or plain pruning if it is better than all of them."""
    solved = {}

    def refit(ridge: float, damp_k: float, damp_v: float) -> PrunePlan:
        if ridge not in solved:
            solved.clear()  # solutions are large, so only one is kept
            solved[ridge] = fit.solve(ridge)
        return fit.refit(*solved[ridge], damp_k, damp_v)

    @functools.cache
    def loss(*settings: float) -> float:
        found = judge(refit(*settings))
        check_finite(torch.tensor(found), "predictions on the texts")
        step(1)
        return found

    ridge = RIDGES[0]
    for larger in RIDGES[1:]:  # the loss has one valley, so stop where it rises
        if loss(larger, 1.0, 1.0) >= loss(ridge, 1.0, 1.0):
            step(len(RIDGES) - 1 - RIDGES.index(larger))
            break
        ridge = larger
    damp_v = min(DAMPINGS, key=lambda damp: loss(ridge, 1.0, damp))
    best = min([(ridge, 1.0, damp_v), (ridge, 0.0, 0.0)], key=lambda settings: loss(*settings))
    return refit(*best)


def _recorded(model, plan: PrunePlan, judge: Judge, about: dict) -> PrunePlan:
    """The plan with a record of how it was made, its loss on the windows that chose it, and the speedups it allows."""
    loss = {name: max(0.0, round(value, 6)) for name, value in judge.losses(plan)._asdict().items()}
    lengths = sorted({min(length, model.config.max_positions) for length in LENGTHS})
    limits = {f"{length} tokens": round(plan.speedup(model, length), 3) for length in lengths}
    about = {"model": model.name, "version": __version__, **about, "full_depth_last": plan.full_depth_last}
    return dataclasses.replace(plan, about=about | {"loss": loss, "speedup_limit": limits})
