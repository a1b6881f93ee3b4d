"""`pop.calibrate`: from a model and texts to a plan with corrections.

texts ──► windows to fit, and windows to judge by (texts.py, held_out.py)
      ──► which layers, and which tokens at full depth (search.py), unless a plan is given
      ──► corrections in closed form (refit.py); the judge chooses lambda
      ──► steps of distillation (distill.py); the judge keeps the best
      ──► the plan, with a record of all this
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import random
import sys
import timeit
from collections.abc import Sequence

import torch

from pop.calibration import search
from pop.calibration.distill import CHECKS, distill
from pop.calibration.exercises import TOKENS_IN_BATCH
from pop.calibration.held_out import CONTINUATION, Judge, hold_out
from pop.calibration.passes import Pass, working_dtype
from pop.calibration.refit import RIDGE, fitted, sum_dtype
from pop.calibration.texts import (
    SHORTEST,
    Window,
    as_list,
    first_tokens,
    size_of,
    text_windows,
    texts_to_fit,
    tokens_needed,
    total_size,
)
from pop.engine.modes import engine_modes
from pop.errors import CacheMemoryError, InputError, PlanError, UnsupportedError, check_count
from pop.model import check_model
from pop.pruning.plan import PrunePlan
from pop.system import __version__, files
from pop.system.memory import free_bytes
from pop.system.progress import progress_bar

RIDGES = (1e-4, 1e-3, RIDGE, 1e-1, 1.0)  # candidates for lambda
SPEEDUP_LENGTHS = (512, 2048, 8192)  # prompt lengths for which a plan records its speedup
FEWEST_WINDOWS = 10  # texts are cut into at least as many windows
SAMPLED = 64  # about how many numbers of each weight identify a run's model

logger = logging.getLogger(__name__)


@engine_modes()
def calibrate(
    model,
    texts: Sequence[str | Sequence[int]] | None = None,
    plan=None,
    *,
    speedup: float = 1.4,
    images=None,
    videos=None,
    rank: int | None = None,
    longest: int = 4096,
    steps: int = 50,
    resume: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PrunePlan:
    """Make a plan for a model: what prefill skips, and corrections that are fitted and distilled on texts.

    Args:
        model: A pop.Model.
        texts: Strings or lists of token ids that resemble the prompts to come. None takes built-in ones, but for the
            last fifth of each, which is left for `pop.check`. Half of each is put into a conversation, if the model
            has a chat format. A wide model needs more.
        plan: A PrunePlan fixes the layers to prune and the full-depth tokens. Another value that `PrunePlan.of` takes,
            such as "10,12,19-29", fixes only the layers, and the tokens are chosen. None: both are chosen.
        speedup: The speedup that the shapes must allow for a prompt of 2,048 tokens. It decides how many layers are
            pruned, unless `plan` does.
        images, videos: A list for each text, as in `Model.generate`. All are in memory at the same time.
        rank: The size of the code that the layers of a group share, from 1 to twice the model's width. A smaller rank
            is faster and less exact. None: half of the model's width.
        longest: The most tokens of a prompt and its continuation in training and in judging. Lengths are spread from
            384 tokens up to it. Texts with images stay whole.
        steps: Steps of distillation after the closed form. 0: none.
        resume: A file that keeps the best plan so far. If it exists, the same call continues from this plan, at the
            step that was reached. Adam's moments begin anew, so the result may differ from that of one uninterrupted
            call. By the held-out windows, it is never worse than the plan that was kept.
        seed: Decides which windows are held out, and what the steps train on.
        progress: Show on stderr what the work takes, and bars if tqdm is installed.

    Returns:
        The plan with corrections, and with a full_depth_first of at least 1. Its `about` records the model, the texts,
        the options and the loss on held-out windows.

    Raises:
        InputError: The texts are too short, or an option is out of range.
        PlanError: The plan does not fit the model, or prunes nothing.
        CacheMemoryError: The work needs more memory than is free.
        UnsupportedError: Several processes share the model, and they would have to decide or to distil.
    """
    check_model(model)
    decides = not isinstance(plan, PrunePlan)  # the tokens at full depth, and the layers if they are not given
    given = _given(model, plan)
    width = model.config.hidden_size
    rank = width // 2 if rank is None else check_count("rank", rank, most=2 * width)
    seed = check_count("seed", seed, least=0)
    longest = min(check_count("longest", longest, least=SHORTEST), model.max_seq_len)
    steps = check_count("steps", steps, least=0)
    if model.part is not None and (steps or decides):
        raise UnsupportedError(
            "several processes share the model, which can only fit corrections then; "
            "give a PrunePlan, and steps=0, or load the model in one process"
        )
    size = plan_numbers(model, rank) * model.dtype.itemsize
    if resume is not None:
        files.check_writable(resume, "the run's progress", InputError, size)
    if given is None:
        search.check_speedup(model, speedup, rank)

    if texts is None:
        texts = texts_to_fit(model)
    texts = as_list(texts)
    windows = _windows(model, texts, images, videos, longest)
    order = random.Random(seed)
    order.shuffle(windows)
    windows, judged = hold_out(windows, longest, model.config.bos_id)
    order.shuffle(windows)  # they were sorted by length, and a fit takes the first ones
    about = {
        "texts": len(texts),
        "windows": len(windows),
        "held_out": len(judged),
        "longest": longest,
        "tokens": total_size(windows),
        "rank": rank,
        "steps": steps,
        "seed": seed,
    }
    run = _identity(model, (given, decides, speedup), windows + judged, about)
    keep = functools.partial(_keep, resume, run)
    plan = _unfinished(resume, run)
    begin = 0 if plan is None else plan.about["steps"]
    needed = needed_bytes(model, rank, steps, longest)
    check_memory(model.device, needed)
    if progress:
        _announce(model, windows, judged, steps - begin, needed, size)
    judge = Judge(model, judged)
    if plan is None:
        if not decides:
            decided = dataclasses.replace(given, full_depth_below=0)  # short prompts are pruned meanwhile
        elif given is not None:
            decided = search.with_full_depth(model, given.layers, windows)
        else:
            with progress_bar("choosing layers", 2, "sets", progress) as step:
                decided = search.search(model, windows, judge, speedup, rank, step)
        fitting = first_tokens(windows, tokens_needed(model))
        groups = decided.groups(model.config.num_layers, model.module.deepstack_layers)
        total = total_size(fitting) * sum(group.is_pruned for group in groups)
        with progress_bar("fitting", total, "tokens", progress) as step:
            plan = min(fitted(model, fitting, decided, rank, RIDGES, step), key=judge.loss)  # which chooses lambda
        keep(plan, 0)
    if steps:
        with progress_bar("distilling", steps, "steps", progress) as step:
            plan = distill(model, plan, windows, judge, steps, seed=seed, begin=begin, keep=keep, progress=step)
    below = search.SHORT if decides else given.full_depth_below
    return dataclasses.replace(plan, about=_record(model, plan, judge, about), full_depth_below=below)


# ---- Before the work ----


def _given(model, plan) -> PrunePlan | None:
    """The given plan, or the given layers as a plan, without corrections. None if neither is given."""
    if plan is None:
        return None
    plan = PrunePlan.of(plan, model.config.num_layers)
    if not plan.layers:
        raise PlanError("the plan prunes no layers, so there is nothing to calibrate; give its layers")
    if search.are_separated(plan.layers, model.module):
        raise PlanError(
            f"the plan prunes the layers {plan.layers}, between which DeepStack adds features of images; "
            "prune one of these layers only"
        )
    return dataclasses.replace(plan, full_depth_first=max(1, plan.full_depth_first), corrections=None, name="")


def _windows(model, texts: list, images, videos, longest: int) -> list[Window]:
    """The texts in windows: many, even if the texts are short."""
    windows = text_windows(model, texts, images, videos, longest)
    if len(windows) < FEWEST_WINDOWS:
        size = max(SHORTEST, total_size(windows) // FEWEST_WINDOWS)
        windows = text_windows(model, texts, images, videos, min(longest, size))
    if len(windows) < 2:
        raise InputError(
            f"calibration needs two windows of at least {SHORTEST} tokens, but the texts have {len(windows)}; "
            "give longer texts, or more of them"
        )
    return windows


def _identity(model, asked, windows: list[Window], about: dict) -> str:
    """What tells a run from others, as a hash. windows: To fit, and then to judge by; `about` counts both."""
    texts = [(tokens, [one.sha256 for one in media]) for tokens, media in windows]
    sampled = [
        weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)].tolist()
        for weight in model.module.parameters()
        if type(weight) is torch.nn.Parameter  # not of int8
    ]
    weights = model.sketch.tolist(), sampled, model.dtype, model.max_seq_len
    return hashlib.sha256(repr((__version__, weights, asked, texts, about)).encode()).hexdigest()


def plan_numbers(model, rank: int) -> int:
    """About how many numbers the corrections of half of the layers are."""
    return rank * (_columns(model.config) + 4 * model.config.hidden_size)


def _columns(config) -> int:
    """The columns of X' Y for half of the layers: K and V, and an update of h."""
    return config.num_layers // 2 * 2 * config.num_kv_heads * config.head_dim + config.hidden_size


def needed_bytes(model, rank: int, steps: int, longest: int) -> int:
    """About how many bytes of memory calibration takes beside the weights, if half of the layers are pruned."""
    config = model.config
    inputs = 2 * config.hidden_size
    size = sum_dtype(model.dtype).itemsize
    factored = (2 * 8 + 4 * size) * inputs**2  # X' X and its factor; squares, and eigenvectors with their workspace
    sums = size * inputs * _columns(config) + factored
    trained = 20 * plan_numbers(model, rank) if steps else 0  # float32 with gradients and Adam's moments, and copies
    dtype = working_dtype(model)
    copy = 0 if model.dtype == dtype else dtype.itemsize * model.num_parameters
    states = max(TOKENS_IN_BATCH, longest) * (4 * inputs + 2 * dtype.itemsize * config.intermediate_size)
    logits = 2 * 4 * CONTINUATION * config.vocab_size
    return copy + max(sums, trained) + states + logits


def check_memory(device: torch.device, needed: int) -> None:
    """Raise CacheMemoryError if the device lacks the `needed` bytes to calibrate."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CacheMemoryError(
            f"calibration takes about {needed / 1e9:.1f} GB beside the weights, but {free / 1e9:.1f} GB are free; "
            "give a smaller rank or longest, or take a larger machine"
        )


def _announce(model, windows: list[Window], judged: list[Window], steps: int, needed: int, size: int) -> None:
    """Say on stderr what the work will take, from the time of the fastest of three passes, since the first warms up.

    needed, size: Bytes of memory, and of the plan.
    """
    tokens, _ = max(windows, key=size_of)
    timed = tokens[:1024]
    model_pass = Pass(model.module, torch.tensor([timed], device=model.device))
    # .item() waits for a GPU.
    times = timeit.repeat(lambda: model_pass.run_layers(model_pass.embed(), 0).sum().item(), number=1, repeat=3)
    seconds = min(times) / len(timed)
    num_tokens = total_size(windows)
    useful = tokens_needed(model)
    if num_tokens < useful:
        print(f"a fit of this width can use {useful:,} tokens; more texts would improve it", file=sys.stderr)
    # Tokens through the whole model, about. The judge sees two sets of layers, each lambda and each check. About
    # half of the layers are pruned alone, for which tokens pass half of them.
    judgements = 2 * (2 + len(RIDGES) + CHECKS)
    fitted_on = min(num_tokens, useful) + 2 * min(num_tokens, search.TOKENS_OF_SET)
    passed = model.config.num_layers // 4 * min(num_tokens, search.TOKENS_OF_LAYER)
    passed += 4 * fitted_on + 3 * steps * min(TOKENS_IN_BATCH, num_tokens)
    passed += judgements * total_size(judged)
    minutes = max(1, round(passed * seconds / 60))
    print(
        f"calibrating on {num_tokens:,} tokens in windows of up to {len(tokens):,}, with {steps} steps: "
        f"about {minutes:,} min on {model.device}, at its present speed, before a verdict, "
        f"{needed / 1e9:.1f} GB beside the weights, a plan of {size / 1e6:.0f} MB",
        file=sys.stderr,
    )


# ---- Progress that is kept, and the record ----


def _keep(path, run: str, plan: PrunePlan, done: int) -> None:
    """Keep the best plan so far for `_unfinished`, and how many steps are done. If that fails, the run continues."""
    if path is None:
        return
    try:
        dataclasses.replace(plan, about={"run": run, "steps": done}).save(path)
    except PlanError as error:
        logger.warning("%s; the run continues without it", error)


def _unfinished(path, run: str) -> PrunePlan | None:
    """The plan that an interrupted run has kept. None if there is no file."""
    path = os.path.expanduser(path or "")
    if not os.path.exists(path):
        return None
    with contextlib.suppress(PlanError):
        plan = PrunePlan.load(path)
        if plan.about.get("run") == run:
            return dataclasses.replace(plan, name="")
    raise InputError(
        f"{path} does not hold the progress of a run of the same model, plan, texts, options and version; "
        "give another path, or remove the file to start anew"
    )


def _record(model, plan: PrunePlan, judge: Judge, about: dict) -> dict:
    """How a plan was made, its loss on the windows that chose it, and the speedups it allows."""
    loss = {name: max(0.0, round(value, 6)) for name, value in judge.losses(plan)._asdict().items()}
    lengths = sorted({min(length, model.config.max_positions) for length in SPEEDUP_LENGTHS})
    limits = {f"{length} tokens": round(plan.speedup(model, length), 3) for length in lengths}
    return {"model": model.name, "version": __version__, **about, "loss": loss, "speedup_limit": limits}
