"""What a plan prunes, for a speedup that the shapes allow: which layers, and which tokens run at full depth.

Prefill needs some layers less than others, above all the deepest. But a model that looks something up in its prompt
may need one of these most. So two sets of layers of equal speed are compared:

    the deepest layers                          ─────────────────[///////////]
    fewer of the deepest, and layers apart      ──[/]──[/]──[/]─────[////////]

Which layers lie apart is decided in three steps. The layer that looks up best selects tokens, and a pruned layer
cannot, so this layer comes last. Virtual gates (importance.py), on text and on repeated passages, tell which layers
prefill needs most. These are kept. A gate tells what a layer does, and not how much of it a correction can supply. So
each of the others is pruned alone, with a correction. The set with the least sum of these losses is taken.

Then each set gets corrections in closed form, from few tokens, and the held-out windows choose. Nothing depends on a
clock, so two runs on a machine give the same plan.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pop.calibration.held_out import LONGEST_PASSAGE, Judge, repeated_passage
from pop.calibration.importance import importance
from pop.calibration.lookup import Pair, selecting_scores
from pop.calibration.refit import fitted
from pop.calibration.texts import Window, choose, excerpt, first_tokens, without_images
from pop.errors import InputError
from pop.pruning.cost import speedup_limit
from pop.pruning.plan import PrunePlan

PROMPT = 2048  # tokens of the prompt for which a speedup is asked
FULL_DEPTH_SHARE = 0.14  # the share of this prompt's tokens that are whole, but for the first
LAST = 192  # how many of them are its last ones (README.md says why no fewer); the others are selected
SHORT = 512  # tokens. What pruning costs in shorter prompts is more than what it saves (data/README.md)
APART = 0.2  # of the pruned layers, the share that lies apart, if some do. With 0.4, no set was better
SAMPLES = 16  # texts, and repeated passages, on which gates are measured
SAMPLE = 192  # tokens of each
RESPONSE = 48  # tokens of it that count
CUES_IN_REPEATED = 4  # a quarter of a repeated passage is its cue
LONGEST_CUE = LONGEST_PASSAGE // CUES_IN_REPEATED  # tokens
SELECTED = 1 / 8  # the share of a prompt's tokens that layers select, to be compared
TOKENS_OF_SET = 36_000  # to which a set of layers is fitted to be compared; with 12,000, a worse set was chosen
LONGEST_WINDOW = 512  # the most tokens of a window of these
PROPOSED = 0.75  # the share of the layers before the deepest ones that are pruned alone, by gates
TOKENS_OF_LAYER = 12_000  # to which the correction of a layer that is pruned alone is fitted
SPARE = 4  # more layers than are needed apart, of which sets are formed
QUICK = 3  # held-out windows that judge such a layer: the shortest with prompts of twice the last tokens or more


def check_speedup(model, speedup: float, rank: int) -> None:
    """Raise InputError for what is not a number above 1, for a model of one layer, and for more than plans allow.

    The largest plan keeps only layer 0 and the DeepStack layers.
    """
    if not isinstance(speedup, (int, float)) or not 1 < speedup < 100:
        raise InputError(f"speedup is {speedup!r}; it must be a number above 1 and below 100, such as 1.4")
    num_layers = model.config.num_layers
    if num_layers == 1:
        raise InputError("the model has a single layer, so prefill cannot skip any; there is nothing to calibrate")
    first = min(max(1, model.module.deepstack_layers), num_layers - 1)
    most = _plan_of(model, range(first, num_layers), torch.zeros(num_layers))
    limit = _limit(model, most, rank)
    if limit < speedup:
        raise InputError(f"speedup is {speedup}, but this model allows at most {limit:.2f}; ask for less")


def search(model, windows: list[Window], judge: Judge, speedup: float, rank: int, step: Callable) -> PrunePlan:
    """The plan, without corrections, that loses least of those whose limit at 2,048 tokens is at least `speedup`.

    Args:
        model: A pop.Model.
        windows: Of text to fit.
        judge: Compares plans on other windows.
        speedup: As `check_speedup` allows it.
        rank: Of the corrections to come.
        step: Is called with 1 for each of the two sets.
    """
    texts, passages = _samples(model, windows)
    lookups = _lookup_scores(model, passages)
    needed = _needed(model, texts) + _needed(model, passages)
    needed[lookups.argmax()] = torch.inf  # it selects tokens, so it is the last to lie apart
    order = needed.argsort().tolist()
    short = [(tokens[:LONGEST_WINDOW], media) for tokens, media in without_images(windows)]
    for_sets = first_tokens(short, TOKENS_OF_SET)
    for_layers = first_tokens(short, TOKENS_OF_LAYER)
    quick = judge.on_shortest(QUICK, 2 * last_and_selected(_prompt_length(model))[0])
    plan_of = functools.partial(_plan_of, model, lookups=lookups)

    def is_fast(layers: Sequence[int]) -> bool:
        return _limit(model, plan_of(layers), rank) >= speedup and not are_separated(layers, model.module)

    num_layers = model.config.num_layers
    least = next(count for count in range(1, num_layers) if is_fast(range(num_layers - count, num_layers)))

    @functools.cache
    def alone(index: int) -> float:
        """The loss if prefill skips a single layer, with a correction."""
        (plan,) = fitted(model, for_layers, plan_of([index]), rank)
        return quick.loss(plan)

    def candidates() -> Iterator[PrunePlan]:
        yield from fitted(model, for_sets, plan_of(range(num_layers - least, num_layers)), rank)
        step(1)
        layers = _with_layers_apart(least, order, is_fast, alone)
        if layers is not None:
            yield from fitted(model, for_sets, plan_of(layers), rank)
        step(1)

    return dataclasses.replace(min(candidates(), key=judge.loss), corrections=None)


def with_full_depth(model, layers: Sequence[int], windows: list[Window]) -> PrunePlan:
    """The plan for given layers, with tokens at full depth. The layer that looks up best selects some of them."""
    _, passages = _samples(model, windows)
    return _plan_of(model, layers, _lookup_scores(model, passages))


# ---- What the layers do ----


def _samples(model, windows: list[Window]) -> tuple[list[Pair], list[Pair]]:
    """Texts with their continuations, and prompts of which a passage is repeated."""
    rng = random.Random(0)
    texts = without_images(windows)
    if not texts:
        raise InputError("every text has images, and a plan is decided on text; give other texts too, or a plan")
    plain = []
    repeated = []
    for tokens, _ in choose(texts, SAMPLES, rng):
        text = excerpt(tokens, SAMPLE, rng, model.config.bos_id)
        cut = len(text) - min(RESPONSE, len(text) // 3)
        prompt = text[:cut]
        plain.append((prompt, text[cut:]))
        passage = repeated_passage(prompt, [], rng)
        cue = max(1, len(passage) // CUES_IN_REPEATED)
        repeated.append((prompt + passage[:cue], passage[cue:]))
    return plain, repeated


def _needed(model, samples: list[Pair]) -> Tensor:
    """How much prefill needs each layer, as shares [L] float64 of the importance of all."""
    scores = importance(model, samples, batch_size=4, progress=False).prefill
    return scores / scores.sum().clamp(min=1e-30)


def _lookup_scores(model, passages: list[Pair]) -> Tensor:
    """The share of a passage's tokens that each layer would select where the passage first occurs, [L].

    Zeros if all prompts are too short.
    """
    repeated = [(prompt, passage) for prompt, passage in passages if len(prompt) >= 3 * LONGEST_CUE]
    if not repeated:
        return torch.zeros(model.config.num_layers)
    return selecting_scores(model, repeated, SELECTED, LONGEST_CUE)


# ---- Plans of a speedup ----


def _with_layers_apart(least: int, order: list[int], is_fast: Callable, alone: Callable) -> tuple[int, ...] | None:
    """The fewest layers that are fast enough, if a fifth of them lie apart. None: there are no such layers.

    Layer 0 and the layer before the deepest ones are kept. No three layers before the deepest ones are neighbours.

    Args:
        least: The number of layers to begin with.
        order: All layers, those that prefill needs least first.
        is_fast: Whether a plan of these layers allows the speedup.
        alone: From a layer's index to the loss if it is pruned alone.
    """
    num_layers = len(order)
    for count in range(least, num_layers):
        apart = max(1, round(APART * count))
        deepest = range(num_layers - count + apart, num_layers)
        candidates = [index for index in order if 0 < index < deepest.start - 1]
        proposed = candidates[: round(PROPOSED * len(candidates))]
        best = sorted(proposed, key=alone)[: apart + SPARE]
        by_sum = sorted(itertools.combinations(best, apart), key=lambda layers: sum(map(alone, layers)))
        valid = ((*sorted(layers), *deepest) for layers in by_sum if not _has_three_neighbours(layers))
        found = next(filter(is_fast, valid), None)
        if found is not None:
            return found
    return None


def _has_three_neighbours(layers: Sequence[int]) -> bool:
    return any({index, index + 1, index + 2} <= {*layers} for index in layers)


def are_separated(layers: Sequence[int], module) -> bool:
    """Whether DeepStack adds features of images between two neighbours of these layers."""
    return any({index, index + 1} <= {*layers} for index in range(module.deepstack_layers))


def _prompt_length(model) -> int:
    return min(PROMPT, model.config.max_positions)


def _plan_of(model, layers: Sequence[int], lookups: Tensor) -> PrunePlan:
    """The plan that prunes these layers, with tokens at full depth."""
    allowed = [index for index in range(max(layers)) if index not in layers]  # kept, with pruned layers after them
    if not allowed:
        return PrunePlan(
            layers,
            full_depth_first=1,
            full_depth_last=round(FULL_DEPTH_SHARE * _prompt_length(model)),
        )
    selecting = max(allowed, key=lambda index: lookups[index])
    last, selected = last_and_selected(_prompt_length(model))
    return PrunePlan(
        layers, full_depth_first=1, full_depth_last=last, full_depth_selected=selected, selecting_layer=selecting
    )


def last_and_selected(num_tokens: int = PROMPT) -> tuple[int, float]:
    """How many last tokens of a prompt are at full depth, and the share of its other tokens that is selected."""
    total = round(FULL_DEPTH_SHARE * num_tokens)
    last = min(LAST, total)
    return last, round((total - last) / (num_tokens - last), 4)


def _limit(model, plan: PrunePlan, rank: int) -> float:
    """The speedup that the shapes allow with corrections of a rank, at 2,048 tokens."""
    return speedup_limit(model.config, _prompt_length(model), plan, rank=rank)
