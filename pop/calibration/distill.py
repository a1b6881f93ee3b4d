"""Distillation: improve a plan's refit projections by gradients of the loss itself.

The closed form (refit.py) brings each layer's K and V close to the full model's. But the loss depends on the model's
predictions. So from the closed form on, with everything else frozen, Adam minimises KL(full || pruned) of exercises
(exercises.py) over the projections. README.md in this folder has the derivation.
"""

import copy
import dataclasses
import hashlib
import math
import random

import torch
import torch.nn.functional as F
from safetensors.torch import save

from pop.backends.cpu import WIDENED
from pop.calibration.exercises import Exercise, exercise
from pop.calibration.held_out import Compared, Judge, Window, pooled
from pop.calibration.resume import SavedProgress
from pop.calibration.student import first_layer, student, teacher
from pop.errors import InputError
from pop.generation.sampling import check_finite
from pop.pruning.plan import PrunePlan

RATE = 0.25  # the share by which a step may change what a projection computes, see `learning_rate`
WARM_UP, LEAST = 20, 0.02  # steps up to the full rate, and the share of it at the last step
BETAS, EPSILON = (0.9, 0.95), 1e-8  # Adam's
LARGEST = 1.0  # the norm to which larger gradients are cut
CHECKS = 8  # how often the held-out windows are judged
ERRORS = 2  # standard errors of a mean that chance explains


@torch.inference_mode(False)  # whatever the caller's mode is
@torch.enable_grad()
def distill(
    model, plan: PrunePlan, windows: list[Window], judge: Judge, steps: int, seed=0, resume=None, progress=int
) -> PrunePlan:
    """Distil the projections of a plan. Returns the best plan by the judge, which may be the given one.

    A plan that is worse than the given one on the continuation of any held-out window is not taken, see `is_worse`.

    Args:
        plan: With projections.
        windows: Of the texts to make exercises of. The judge's are others.
        seed: Decides the exercises.
        resume: A file that keeps unfinished work. If it exists, the run continues from it.
        progress: Is called with the number of steps done since its last call. By default nothing happens.

    Raises:
        InputError: The gradients are not finite, or the resume file cannot be used.
    """
    given = judge.compare(plan)
    state = {"steps": torch.tensor(0), "least": torch.tensor(pooled(given).mean)}  # all that a run needs to continue
    names, rates = tuple(plan.corrections.tensors), {}
    for name, tensor in plan.corrections.tensors.items():
        tensor = tensor.to(model.device, torch.float32)
        rates[name] = rates["weight"] if name == "bias" else learning_rate(tensor)
        state |= {name: tensor.clone(), f"best {name}": tensor.clone()}
        state |= {f"{moment} {name}": torch.zeros_like(tensor) for moment in ("mean", "square")}
    if resume is not None:
        record = SavedProgress(resume, _identity(model, plan, windows, judge, steps, seed))
        kept = record.read(state)
        for name, tensor in (kept or {}).items():
            state[name].copy_(tensor)
        record.write(state)  # before the work, in case the path cannot be written
    module = working_copy(model)
    checks = {(count * steps) // min(CHECKS, steps) for count in range(1, CHECKS + 1)}  # evenly spread up to the end
    progress(done := int(state["steps"]))
    for number in range(done, steps):
        rng = random.Random(f"{seed} {number}")
        batch = exercise(model, windows, number, rng)
        trained = {name: state[name].requires_grad_() for name in names}
        trainee = dataclasses.replace(plan, corrections=plan.corrections.replaced(trained))
        loss = distillation_loss(module, model.vision, trainee, batch, rng)
        gradients = dict(zip(names, torch.autograd.grad(loss, [*trained.values()]), strict=True))
        adam_step(state, gradients, {name: rate * schedule(number, steps) for name, rate in rates.items()})
        if number + 1 in checks:
            found = judge.compare(_plan(model, plan, state))
            if pooled(found).mean < state["least"] and not is_worse(found, given):
                state["least"] = torch.tensor(pooled(found).mean)
                state |= {f"best {name}": state[name].detach().clone() for name in names}
            if resume is not None:
                record.write(state)
        progress(1)
    return _plan(model, plan, state, "best ")


def distillation_loss(module, vision, plan: PrunePlan, batch: Exercise, rng: random.Random):
    """KL(full || pruned) of the continuations of a batch, in nats a token.

    Args:
        module: A PrunableModel.
        vision: Its Processor.
        plan: With the projections to differentiate, in any dtype.
        rng: Decides whether the plan's full-depth tokens or only the prompt's last one and first ones are used.
    """
    (B, T), cut = batch.tokens.shape, batch.cut
    plan = rng.choice((plan, dataclasses.replace(plan, full_depth_last=1, full_depth_selected=0.0)))
    with torch.no_grad():
        images = vision.images(module, batch.media, batch.tokens, torch.full((B,), T))
        states, full = teacher(module, batch.tokens.to(plan.corrections.weight.device), images, [first_layer(plan)])
    pruned = student(module, plan, states[first_layer(plan)], cut, images)

    def divergence(full, pruned):  # [N, D] each. The gradient comes with the loss, so no logits [N, V] are kept for it
        x, p = pruned.detach().requires_grad_(), module.head(full).log_softmax(-1)
        loss = F.kl_div(module.head(x).log_softmax(-1), p, log_target=True, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.detach() + (gradient * (pruned - x.detach())).sum()  # 0, with this gradient

    predicted = T - cut + 1  # tokens: the continuation, and the one after it
    pairs = zip(full[:, -predicted:], pruned[:, -predicted:], strict=True)
    return sum(divergence(*pair) for pair in pairs) / (B * predicted)


def check_gradients(model) -> None:
    """Raise InputError if autograd cannot use the weights."""
    if any(parameter.is_inference() for parameter in model.module.parameters()):
        raise InputError("the model was loaded under torch.inference_mode, which rules out gradients; load it outside")


def working_copy(model) -> torch.nn.Module:
    """The module in bfloat16, or in float32 on a CPU without fast products in bfloat16."""
    is_slow = model.device.type == "cpu" and torch.bfloat16 in WIDENED
    dtype = torch.float32 if is_slow else torch.bfloat16
    return model.module if model.dtype == dtype else copy.deepcopy(model.module).to(dtype)


def _plan(model, plan: PrunePlan, state: dict[str, torch.Tensor], which: str = "") -> PrunePlan:
    """The plan with the projections of a state, the latest ones or the best ones."""
    tensors = {name: state[which + name].detach().to(model.dtype, copy=True) for name in plan.corrections.tensors}
    return dataclasses.replace(plan, corrections=plan.corrections.replaced(tensors))


def is_worse(found: list[Compared], given: list[Compared]) -> bool:
    """Whether continuations are predicted worse on average, or those of any window, by more than chance explains."""
    if pooled(found).continuation > pooled(given).continuation:
        return True
    changes = (new[0].double() - old[0].double() for new, old in zip(found, given, strict=True))  # of KL, by token
    return any(change.mean() > ERRORS * change.std(correction=0) / len(change) ** 0.5 for change in changes)


def learning_rate(weight: torch.Tensor) -> float:
    """The largest learning rate for a matrix of projections [..., I].

    A step of Adam changes each weight by up to about the learning rate. Inputs x have a mean square of 1. So it changes
    w x, whose size is about |w|, by up to about I times the learning rate.
    """
    return RATE * float(weight.square().sum(-1).mean().sqrt()) / weight.shape[-1]


def schedule(number: int, steps: int) -> float:
    """The share of the largest learning rate at a step: a linear rise under half a cosine."""
    return min((number + 1) / WARM_UP, LEAST + (1 - LEAST) * (1 + math.cos(math.pi * number / steps)) / 2)


@torch.no_grad()
def adam_step(state: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor], rates: dict[str, float]) -> None:
    """A step of Adam (Kingma and Ba 2015) with gradients and learning rates by name, in place."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    check_finite(norm, "gradients of the projections")
    state["steps"] += 1
    mean_share, square_share = (1 - beta ** int(state["steps"]) for beta in BETAS)
    for name, gradient in gradients.items():
        gradient = gradient * (LARGEST / norm).clamp(max=1)
        mean = state[f"mean {name}"].lerp_(gradient, 1 - BETAS[0]) / mean_share
        square = state[f"square {name}"].lerp_(gradient.square(), 1 - BETAS[1]) / square_share
        state[name] -= rates[name] * mean / (square.sqrt() + EPSILON)


def _identity(model, plan: PrunePlan, windows: list[Window], judge: Judge, steps: int, seed: int) -> dict[str, str]:
    """What tells a run from others."""
    texts = [[(tokens, [one.sha256 for one in media]) for tokens, media in some] for some in (windows, judge.windows)]
    start = save({name: tensor.contiguous() for name, tensor in plan.corrections.tensors.items()})
    fields = repr((plan.fields(), plan.corrections.rank)).encode()
    return {
        "model": f"{model.fingerprint} {model.dtype} {model.max_seq_len}",
        "plan": hashlib.sha256(fields + start).hexdigest(),
        "texts": hashlib.sha256(repr(texts).encode()).hexdigest(),
        "steps": str(steps),
        "seed": str(seed),
    }
