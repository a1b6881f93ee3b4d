"""Distillation: improve a plan's corrections by gradients of the loss itself.

The closed form (refit.py) brings each layer's K and V close to the full model's. But the loss depends on the model's
predictions. So Adam (Kingma and Ba 2015) starts from the closed form and minimises KL(full || pruned) of exercises
(exercises.py) over the corrections. Everything else is frozen. README.md in this folder has the derivation.
"""

import dataclasses
import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.calibration.exercises import Exercise, exercise
from pop.calibration.held_out import Judge
from pop.calibration.passes import Pass, first_layer, working_copy
from pop.calibration.texts import Window
from pop.generation.sampling import check_finite
from pop.pruning.plan import PrunePlan
from pop.runner import row_lengths

RATE = 0.04  # the share by which a step may change what a matrix computes, see `learning_rate`
WARM_UP = 4  # steps up to the full rate
LEAST = 0.02  # the share that the rate falls towards
BETAS = (0.9, 0.95)  # Adam's
LARGEST = 1.0  # the norm to which larger gradients are cut
CHECKS = 5  # how often the held-out windows are judged


@torch.inference_mode(False)  # whatever the caller's mode is
@torch.enable_grad()
def distill(
    model,
    plan: PrunePlan,
    windows: list[Window],
    judge: Judge,
    steps: int,
    *,
    seed: int = 0,
    begin: int = 0,
    keep: Callable[[PrunePlan, int], object] = lambda plan, done: None,
    progress: Callable[..., object] = lambda count, note="": None,
) -> PrunePlan:
    """Distil the corrections of a plan. Returns the best plan by the judge, which may be the given one.

    Args:
        model: A pop.Model.
        plan: With corrections.
        windows: Of the texts to make exercises of. The judge's are others.
        judge: Compares plans on held-out windows.
        steps: How many.
        seed: Decides the exercises.
        begin: How many steps are done already. The plan is the best one up to there, and Adam's moments begin anew.
        keep: Is called with the best plan and the number of steps that are done, after each check.
        progress: Is called with the number of steps done since its last call, and a note on the loss.

    Raises:
        InputError: The gradients are not finite.
    """
    best = model.resolve(plan)
    least = judge.losses(best).mean
    trained = {
        name: tensor.to(torch.float32, copy=True).requires_grad_() for name, tensor in best.corrections.tensors.items()
    }
    parameters = [*trained.values()]
    groups = [{"params": [tensor], "rate": learning_rate(tensor.detach())} for tensor in parameters]
    adam = torch.optim.Adam(groups, betas=BETAS)
    module = working_copy(model)
    checks = {(count * steps) // min(CHECKS, steps) for count in range(1, CHECKS + 1)}  # evenly spread up to the end
    progress(begin)
    for number in range(begin, steps):
        rng = random.Random(f"{seed} {number}")
        batch = exercise(model, windows, number, rng)
        loss = distillation_loss(module, model.vision, _with_tensors(best, trained), batch)
        adam.zero_grad()
        loss.backward(inputs=parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, LARGEST)
        check_finite(norm, "gradients of the corrections")
        for group in adam.param_groups:
            group["lr"] = group["rate"] * schedule(number, steps)
        adam.step()
        if number + 1 in checks:
            rounded = {name: tensor.detach().to(model.dtype, copy=True) for name, tensor in trained.items()}
            candidate = _with_tensors(best, rounded)
            found = judge.losses(candidate).mean
            if found < least:
                best = candidate
                least = found
            keep(best, number + 1)
        progress(1, f"loss {loss.item():.4f}")
    return best


def _with_tensors(plan: PrunePlan, tensors: dict[str, Tensor]) -> PrunePlan:
    """The plan with other tensors of its corrections."""
    return dataclasses.replace(plan, corrections=plan.corrections.replaced(tensors))


def distillation_loss(module, vision, plan: PrunePlan, batch: Exercise) -> Tensor:
    """KL(full || pruned) of the continuations of a batch, in nats a token: a scalar with gradients.

    Args:
        module: A PrunableModel.
        vision: Its Processor.
        plan: With the corrections to differentiate, in any dtype.
        batch: Prompts and continuations.
    """
    B, T = batch.tokens.shape
    first = first_layer(plan)
    with torch.no_grad():
        images = vision.images(module, batch.media, batch.tokens, row_lengths(None, batch.tokens))
        model_pass = Pass(module, batch.tokens, images)
        entering = model_pass.run_layers(model_pass.embed(), 0, first)
        full = model_pass.run_layers(entering, first)
    pruned = model_pass.run_pruned(plan, entering, batch.cut)
    predicted = T - batch.cut + 1  # tokens: the continuation, and the one after it
    rows = zip(full[:, -predicted:], pruned[:, -predicted:], strict=True)
    return sum(_divergence(module, *row) for row in rows) / (B * predicted)


def _divergence(module, full: Tensor, pruned: Tensor) -> Tensor:
    """The sum of KL(full || pruned) over N tokens, from h [N, D] after the last layer.

    The gradient is computed together with the loss, so that no logits [N, V] are kept for it.
    """
    h = pruned.detach().requires_grad_()
    p = module.head(full).log_softmax(-1)
    q = module.head(h).log_softmax(-1)
    loss = F.kl_div(q, p, log_target=True, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, h)
    # Its value is 0, and its derivative by `pruned` is `gradient`. So backward continues there, without the logits.
    zero = (gradient * (pruned - h.detach())).sum()
    return loss.detach() + zero


def learning_rate(weight: Tensor) -> float:
    """The largest learning rate for a matrix [..., I].

    A step of Adam changes each weight by up to about the learning rate. Inputs x have a mean square of 1. So it changes
    w x, whose size is about |w|, by up to about I times the learning rate.
    """
    return RATE * float(weight.square().sum(-1).mean().sqrt()) / weight.shape[-1]


def schedule(number: int, steps: int) -> float:
    """The share of the largest learning rate at a step: a linear rise under half a cosine."""
    rise = (number + 1) / WARM_UP
    fall = (1 + math.cos(math.pi * number / steps)) / 2
    return min(rise, LEAST + (1 - LEAST) * fall)
