"""The closed form: corrections of the K and V of pruned layers, by ridge regression on calibration text.

A pruned layer projects K and V from h, the state that enters its group of pruned layers. Its weights were trained on a
later state. Much of the resulting error is linear in this state. For token t, let

    s_t    be [x_t ; x_{t-1}], the states of this token and the one before it, normalised without a weight
    r_t    be K and V as the full model projects them, minus the layer's own projections of h, both before K's norm
           and the rotary positions

If kept layers follow the group, r_t also holds the full model's h after the group, minus the h that entered it (or zero
for an attention sink, see SINK). With rows s_t in X and r_t in Y, of N tokens, ridge regression toward no correction is

    min over C:   sum over t  |r_t - C s_t|^2  +  lambda N |C|^2            C = Y' X (X' X + lambda N I)^-1

All layers of a group share a code of R numbers, so C is replaced by a product U P of rank R, the one that raises this
minimum least. P is `shared`. The rows of U are `weight`, and at the end `update`, if there is one. README.md in this
folder derives it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pop.calibration.passes import Pass, working_copy
from pop.calibration.texts import Window, batches, total_size
from pop.engine.compile import SMALLEST_COMPILED
from pop.errors import InputError
from pop.generation.sampling import check_finite
from pop.pruning.corrections import Corrections, GroupCorrections, code_inputs
from pop.pruning.plan import PrunePlan
from pop.runner import padded

RIDGE = 1e-2  # lambda, unless held-out windows choose it
# An update that is larger than this, in medians of a batch, makes a token an attention sink. It counts as zero, because
# it would outweigh all others in a sum of squares. The first token of a text is a sink, and is not fitted. Without BOS,
# a second token that repeats the first is one as well.
SINK = 100


class Sums:
    """Sums over the tokens of the texts, from which the corrections of a group follow.

    The columns of Y are K and V of each layer, and the update of h at the end, if there is one.

    Args:
        model: A pop.Model.
        layers: The group.
    """

    def __init__(self, model, layers: range):
        config = model.module.config
        inputs = 2 * config.hidden_size
        self.layers = layers
        self.has_update = layers.stop < config.num_layers  # kept layers follow
        widths = [2 * config.num_kv_heads * config.head_dim] * len(layers)  # of the columns
        if self.has_update:
            widths.append(config.hidden_size)
        self.count = 0  # N, the number of tokens
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=model.device)  # X' X
        # X' Y, in the dtype of the products of one batch.
        self.xy = torch.zeros(inputs, sum(widths), dtype=sum_dtype(model.dtype), device=model.device)
        self.columns = self.xy.split(widths, dim=1)  # of each layer, and of the update


def fitted(
    model,
    windows: list[Window],
    plan: PrunePlan,
    rank: int,
    ridges: Sequence[float] = (RIDGE,),
    step: Callable = lambda count: None,
) -> Iterator[PrunePlan]:
    """Yield a plan with corrections that are fitted to windows, for each lambda of its last group.

    What enters a group depends on the updates of h after earlier groups. So each group takes a pass over the windows. A
    group with an update takes lambda = RIDGE.

    Args:
        model: A pop.Model.
        windows: Of text.
        plan: Without corrections. It prunes no neighbours between which DeepStack adds features of images.
        rank: Of the corrections.
        ridges: The candidates for lambda.
        step: Is called with the number of tokens that have passed since its last call.
    """
    groups = plan.groups(model.config.num_layers, model.module.deepstack_layers)
    groups = [group.layers for group in groups if group.is_pruned]
    # Passes in bfloat16 leave the loss as it is. A small model, or a part of one, need not be copied.
    is_copied = model.num_parameters >= SMALLEST_COMPILED and model.part is None
    module = working_copy(model) if is_copied else model.module
    solutions = []
    solved = PrunePlan(full_depth_first=plan.full_depth_first)  # the groups before the one that is fitted
    for layers in groups:
        sums = Sums(model, layers)
        for batch in batches(windows):
            accumulate(model, batch, plan.layers[0], solved, sums, module)
            step(total_size(batch))
        if not sums.count:
            raise InputError("full_depth_first leaves no token to fit to; make it smaller, or give longer texts")
        for ridge in [RIDGE] if sums.has_update else ridges:
            solution = solve(model, sums, rank, ridge)
            corrections = _corrections(model, plan, [*solutions, solution])
            if layers == groups[-1]:
                yield dataclasses.replace(plan, corrections=corrections)
        solutions.append(solution)
        solved = PrunePlan(corrections.layers, full_depth_first=plan.full_depth_first, corrections=corrections)
        del sums  # they are large


def solve(model, sums: Sums, rank: int, ridge: float) -> GroupCorrections:
    """Solve the normal equations of a group, and reduce the solution to the rank. It is in float64.

    Let F be the Cholesky factor, F F' = X' X / N + lambda I. A change of C by Delta raises the minimum by
    N |Delta F|^2. So the best approximation keeps the largest singular directions Q of C F = (F^-1 X' Y / N)', by
    U = C F Q and P = Q' F^-1. Then P s has a mean square of about 1. C F is computed for one layer at a time, and
    twice, because all of it would be as large as X' Y.
    """
    check_finite(sums.xy, "hidden states of the texts")  # what is not finite in X spoils every column of X' Y
    gram = sums.xx / sums.count
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)  # F
    del gram

    def parts() -> Iterator[Tensor]:
        """The rows of C F that belong to each layer, and those of the update: [2 * K * E or D, 2 * D]."""
        for columns in sums.columns:
            yield torch.linalg.solve_triangular(factor, columns.double() / sums.count, upper=False).T

    basis = _largest_directions(model, sums, parts(), rank)  # Q
    rows = [part @ basis for part in parts()]
    weight = torch.stack([_of_all_heads(model, row) for row in rows[: len(sums.layers)]])
    shared = torch.linalg.solve_triangular(factor, basis.T, upper=False, left=False)
    return GroupCorrections(shared, weight, rows[-1] if sums.has_update else None)


def _largest_directions(model, sums: Sums, parts: Iterator[Tensor], rank: int) -> Tensor:
    """As many orthonormal directions [2 * D, R] as the rank, in which the rows of all parts are largest."""
    squares = torch.zeros_like(sums.xx, dtype=sums.xy.dtype)
    for number, part in enumerate(parts):
        if number < len(sums.layers):
            part = _of_all_heads(model, part)
        part = part.to(squares.dtype)
        squares.addmm_(part.T, part)
        del part  # what follows takes much memory
    directions = torch.linalg.eigh(squares).eigenvectors  # of the largest eigenvalues at the end
    return directions[:, -rank:].to(sums.xx.dtype, copy=True)


def _of_all_heads(model, rows: Tensor) -> Tensor:
    """Rows for K and V of a layer [2 * K * E, 2 * D or R] -> the same for the heads of all processes."""
    if model.part is None:
        return rows
    return model.part.gather_heads(rows.unflatten(0, (2, -1))[None])[0].flatten(0, 1)


def _corrections(model, plan: PrunePlan, solutions: list[GroupCorrections]) -> Corrections:
    """The corrections of a plan's first groups."""
    codes, weights, updates = zip(*solutions, strict=True)
    weight = torch.cat(weights).unflatten(1, (2, -1)).to(model.dtype)  # [n, 2, K * E, R]
    shared = torch.stack(codes).to(model.dtype)
    updates = [update for update in updates if update is not None]
    update = torch.stack(updates).to(model.dtype) if updates else None
    layers = plan.layers[: len(weight)]
    return Corrections(layers, weight, shared, update, sketch=model.sketch[list(layers)])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over products of numbers of a dtype. In float32, products of 16-bit numbers are exact."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def accumulate(model, windows: list[Window], first: int, solved: PrunePlan, sums: Sums, module) -> None:
    """Add the tokens of a batch of windows to the sums of a group.

    One full pass gives the targets. The pass by the plan branches off at its first pruned layer.

    Args:
        model: A pop.Model.
        windows: Of about equal lengths.
        first: The first pruned layer of the plan that is fitted.
        solved: The groups before this one, with their corrections. Only its first full_depth_first tokens, to which
            nothing is fitted, run at full depth.
        sums: Of the group.
        module: The model's own, or a copy that runs in its place.
    """
    tokens, lengths = padded([tokens for tokens, _ in windows])  # [B, T] and [B]
    images = model.vision.images(module, [media for _, media in windows], tokens, lengths)
    model_pass = Pass(module, tokens, images)
    position = torch.arange(tokens.shape[1], device=model.device)
    is_inside = position < lengths.to(model.device)[:, None]  # [B, T], not padding
    is_fitted = is_inside & (position >= solved.full_depth_first)
    group = sums.layers
    h = model_pass.run_layers(model_pass.embed(), 0, first)
    entering = h  # [B, T, D], by the plan
    if solved.layers:
        longer = tokens.shape[1] + 1  # tokens: the prompt's last one, which runs at full depth, is not among these
        entering = model_pass.run_pruned(model.resolve(solved), h, longer, group.start)
    x = code_inputs(module.layers[group.start], entering, torch.zeros_like(entering[:, 0]))
    x = x[is_fitted].to(sum_dtype(h.dtype))  # [N, 2 * D]
    sums.xx += x.T @ x
    sums.count += len(x)

    def add(columns: Tensor, full: Tensor, own: Tensor) -> None:
        """Add to columns of X' Y what the full model has and h does not give, [B, T, 2 * K * E or D]."""
        difference = (full - own)[is_fitted].to(x.dtype)
        columns.add_(x.T @ difference)

    for index in range(first, group.stop):
        layer = module.layers[index]
        if index in group:
            columns = sums.columns[index - group.start]
            add(columns, torch.cat(layer.projected(h), dim=-1), torch.cat(layer.projected(entering), dim=-1))
        if sums.has_update or index < group[-1]:  # only an update needs what the last layer makes of h
            h = model_pass.run_layer(index, h)
    if sums.has_update:
        # The full model's h may have features of images from DeepStack. Add them here as well, so that they cancel.
        own = images.add_deepstack(entering, group[-1])
        size = (h - own).float().norm(dim=-1)  # [B, T]
        is_sink = (size > SINK * size[is_fitted].median()) & size.isfinite()
        add(sums.columns[-1], torch.where(is_sink[..., None], own, h), own)
