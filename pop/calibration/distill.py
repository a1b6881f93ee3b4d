"""Distillation: improve a plan's corrections by gradients of the loss itself.

The closed form (refit.py) brings each layer's K and V close to the full model's. But the loss depends on the model's
predictions. So Adam starts from the closed form and minimises KL(full || pruned) of exercises (exercises.py) over the
corrections. Everything else is frozen. README.md in this folder has the derivation.
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

RATE = 0.25  # the share by which a step may change what a matrix computes, see `learning_rate`
WARM_UP = 20  # steps up to the full rate
LEAST = 0.02  # the share of the full rate at the last step
BETAS = (0.9, 0.95)  # Adam's
LARGEST = 1.0  # the norm to which larger gradients are cut
CHECKS = 8  # how often the held-out windows are judged


class _Run:
    """All that changes during a run: the trained tensors in float32, Adam's moments, and the best tensors."""

    def __init__(self, model, plan: PrunePlan, least: float):
        self.model = model
        self.plan = plan
        self.steps = torch.tensor(0.0)  # that are done
        self.least = torch.tensor(least)  # the held-out loss of the best tensors
        given = {name: tensor.to(model.device) for name, tensor in plan.corrections.tensors.items()}
        self.best = {name: tensor.clone() for name, tensor in given.items()}  # in the model's dtype
        self.trained = {name: tensor.to(torch.float32, copy=True).requires_grad_() for name, tensor in given.items()}
        rates = {name: learning_rate(tensor.float()) for name, tensor in given.items()}
        groups = [{"params": [tensor], "rate": rates[name]} for name, tensor in self.trained.items()]
        self.adam = torch.optim.Adam(groups, betas=BETAS)
        for tensor in self.trained.values():
            moments = {"exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
            self.adam.state[tensor] = {"step": self.steps.clone(), **moments}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that change, by name."""
        tensors = {"steps": self.steps, "least": self.least}
        for name, tensor in self.trained.items():
            tensors |= {name: tensor.detach(), f"best {name}": self.best[name]}
            tensors |= {f"{moment} {name}": value for moment, value in self.adam.state[tensor].items()}
        return tensors

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Continue from saved `tensors`. Those that are not saved stay."""
        for name, tensor in self.tensors().items():
            tensor.copy_(saved.get(name, tensor))

    def with_tensors(self, tensors: dict[str, Tensor]) -> PrunePlan:
        """The plan with other tensors."""
        return dataclasses.replace(self.plan, corrections=self.plan.corrections.replaced(tensors))

    def step(self, loss: Tensor, share: float) -> None:
        """A step of Adam (Kingma and Ba 2015), with a share of the full learning rates."""
        self.adam.zero_grad()
        loss.backward(inputs=list(self.trained.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), LARGEST)
        check_finite(norm, "gradients of the corrections")
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * share
        self.adam.step()
        self.steps += 1

    def rounded(self, tensors: dict[str, Tensor]) -> PrunePlan:
        """The plan with tensors in the model's dtype."""
        dtype = self.model.dtype
        return self.with_tensors({name: tensor.detach().to(dtype, copy=True) for name, tensor in tensors.items()})

    def check(self, judge: Judge) -> None:
        """Keep the trained tensors if the held-out windows find them the best so far."""
        loss = judge.losses(self.rounded(self.trained)).mean
        if loss < self.least:
            self.least.fill_(loss)
            for name, tensor in self.trained.items():
                self.best[name].copy_(tensor.detach())


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
    restored: dict[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
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
        restored: Tensors that `save` has received, from which the run continues. The plan is the same then. Other
            tensors are ignored.
        save: Is called with the tensors that the run needs to continue, after each check.
        progress: Is called with the number of steps done since its last call, and a note on the loss.

    Raises:
        InputError: The gradients are not finite.
    """
    run = _Run(model, plan, judge.losses(plan).mean)
    run.restore(restored or {})
    module = working_copy(model)
    checks = {(count * steps) // min(CHECKS, steps) for count in range(1, CHECKS + 1)}  # evenly spread up to the end
    done = int(run.steps)
    progress(done)
    for number in range(done, steps):
        rng = random.Random(f"{seed} {number}")
        batch = exercise(model, windows, number, rng)
        loss = distillation_loss(module, model.vision, run.with_tensors(run.trained), batch)
        run.step(loss, schedule(number, steps))
        if number + 1 in checks:
            run.check(judge)
            save(run.tensors())
        progress(1, f"loss {loss.item():.4f}")
    return run.rounded(run.best)


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
        images = vision.images(module, batch.media, batch.tokens, torch.full((B,), T))
        run = Pass(module, batch.tokens.to(plan.corrections.weight.device), images)
        entering = run.layers(run.embed(), 0, first)
        full = run.layers(entering, first)
    pruned = run.student(plan, entering, batch.cut)
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
    zero = (gradient * (pruned - h.detach())).sum()  # with this gradient
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
