"""The loss on held-out text by which calibration chooses: KL(full || pruned) of a continuation and of a repetition.

A low KL of a continuation does not show that a model can still look things up in its prompt. A repeated passage shows
it, because the full model copies such a passage almost surely, whatever the text is.

    prompt: passage inside            continuation      the passage again
    ─────────[///////]─────────────┊────────────────┊[cue][//counted//]
           by the plan             ┊           at full depth
"""

import copy
import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pop.calibration.passes import Pass, first_layer
from pop.calibration.texts import SHORTEST, Window, head_of, size_of, total_size
from pop.generation.sampling import check_finite
from pop.pruning.plan import PrunePlan
from pop.runner import padded

CONTINUATION = 128  # the most tokens of a continuation; it is at most a third of a window
BEGINNING = 16  # the first tokens of a continuation, which also count by themselves; a single one could decide
JUDGED_LENGTHS = (512, 1024)  # prompt lengths by which plans are judged, besides the longest
ROUNDS = 3  # windows of each length
HELD_OUT = 5  # at most one of this many tokens is held out
LONGEST_PASSAGE = 64  # the most tokens of a repeated passage
CUES_IN_PASSAGE = 8  # an eighth of a passage is its cue, after which the model can know what follows


class Losses(NamedTuple):
    """What a plan loses, over all tokens of all windows."""

    continuation: float  # KL(full || pruned), in nats a token
    repetition: float  # likewise, of repeated passages after their cues; 0 if no window is long enough
    copied: float  # the share of these tokens that are the pruned model's likeliest
    beginning: float  # KL of the first 16 tokens of each continuation

    @property
    def mean(self) -> float:
        """The loss to minimise: the three kinds of tokens weigh the same."""
        return (self.continuation + self.repetition + self.beginning) / 3


class Case(NamedTuple):
    """A held-out window, and what the full model computes on it."""

    prompt_length: int  # how many tokens the prompt has
    continuation_length: int  # how many tokens follow it
    passage: list[int]  # of the prompt, which is repeated after the continuation; may be empty
    model_pass: Pass  # over prompt, continuation and passage, without the passage's last token
    entering: dict[int, Tensor]  # h [1, T, D] where the last judged plan leaves the full pass, by that layer's index
    full: Tensor  # h [N + 1, D] that predicts the N tokens after the prompt, and the next one


class Judge:
    """The losses of plans on windows of text.

    The last 128 tokens of a window are the continuation, but at most a third of the window, and only tokens after its
    last image. The others are the prompt. After the continuation, a passage of the prompt is repeated.

    Args:
        model: A pop.Model.
        windows: Token ids, each with its images and videos.
    """

    @torch.no_grad()
    def __init__(self, model, windows: Sequence[Window]):
        self.model = model
        rng = random.Random(0)
        self.cases = [self._case(window, rng) for window in windows]

    def _case(self, window: Window, rng: random.Random) -> Case:
        model = self.model
        tokens, media = window
        images = model.vision.locate(tokens, media)
        cut = max([len(tokens) * 2 // 3, len(tokens) - CONTINUATION, *(image.stop for image in images)])
        passage = repeated_passage(tokens[:cut], images, rng)
        most = model.max_seq_len - len(passage)  # tokens of the prompt and its continuation
        if most < cut:  # after an image
            passage = []
            most = len(tokens)
        tokens = tokens[:most]
        row, lengths = padded([tokens + passage[:-1]])  # [1, T] and [1]
        shown = model.vision.images(model.module, [media], row, lengths)
        model_pass = Pass(model.module, row, shown)
        h = model_pass.run_layers(model_pass.embed(), 0)
        return Case(cut, len(tokens) - cut, passage, model_pass, {}, h[0, cut - 1 :])

    @torch.no_grad()
    def losses(self, plan: PrunePlan) -> Losses:
        """The losses of a plan over all windows."""
        plan = self.model.resolve(plan)
        parts = []  # of each window, in the order of Losses
        for case in self.cases:
            h = self._pruned(plan, case) if plan.layers else case.full
            # Row i predicts token i after the prompt.
            full, pruned = (self.model.module.head(x).log_softmax(-1) for x in (case.full, h))  # [N + 1, V]
            kl = F.kl_div(pruned, full, log_target=True, reduction="none").sum(-1)  # [N + 1]
            cue = max(1, len(case.passage) // CUES_IN_PASSAGE)
            targets = torch.tensor(case.passage[cue:], dtype=torch.int64, device=pruned.device)
            begin = case.continuation_length + cue  # where the first token to copy is predicted
            copied = pruned[begin:].argmax(-1) == targets
            continued = kl[: case.continuation_length + 1]
            parts.append((continued, kl[begin:], copied, continued[:BEGINNING]))
        return Losses(*(_mean(torch.cat(kind)) for kind in zip(*parts, strict=True)))

    def loss(self, plan: PrunePlan) -> float:
        """The loss of a plan, to minimise. Raises InputError if it is not finite."""
        mean = self.losses(plan).mean
        check_finite(torch.tensor(mean), "predictions on the texts")
        return mean

    def on_shortest(self, count: int, least: int) -> "Judge":
        """A quicker judge, of the shortest windows only: `count` of those whose prompts have `least` tokens or more.

        If there are none, it has all windows.
        """
        judge = copy.copy(self)
        long_enough = [case for case in self.cases if case.prompt_length >= least]
        judge.cases = sorted(long_enough or self.cases, key=lambda case: case.prompt_length)[:count]
        return judge

    def _pruned(self, plan: PrunePlan, case: Case) -> Tensor:
        """As Case.full, by a plan."""
        first = first_layer(plan)
        if first not in case.entering:
            case.entering.clear()  # the states of each layer would take much memory
            case.entering[first] = case.model_pass.run_layers(case.model_pass.embed(), 0, first)
        return case.model_pass.run_pruned(plan, case.entering[first], case.prompt_length)[0, case.prompt_length - 1 :]


def _mean(values: Tensor) -> float:
    """0 for no values."""
    return values.double().sum().item() / max(1, len(values))


def hold_out(windows: list[Window], longest: int, bos_id: int | None) -> tuple[list[Window], list[Window]]:
    """Split windows into those to fit, and those to judge by, of several lengths up to `longest` tokens.

    At least one window is held out. More are, as long as these have at most a fifth of all tokens. What follows the
    held-out part of a window is fitted, after BOS if the window begins with it.
    """
    left = sorted(windows, key=size_of)
    room = total_size(windows) // HELD_OUT
    judged = []
    for prompt in (*JUDGED_LENGTHS, longest) * ROUNDS:
        size = min(prompt + CONTINUATION, longest)
        number = min(bisect_left(left, size, key=size_of), len(left) - 1)  # of the shortest window of that size
        tokens, media = left[number]
        taken = tokens if media else tokens[:size]
        if judged and len(taken) > room:
            continue
        left.pop(number)
        room -= len(taken)
        judged.append((taken, media))
        rest = tokens[len(taken) :]
        if len(rest) >= SHORTEST:
            insort(left, (head_of(tokens, bos_id) + rest, []), key=size_of)
    return left, judged


def repeated_passage(prompt: list[int], images: Sequence[range], rng: random.Random) -> list[int]:
    """A passage of a prompt that can follow it again, to test or to train copying from the prompt.

    It is a quarter of the prompt's longest stretch of text, at most 64 tokens, or empty if that has less than 8 tokens.
    It comes from the stretch's first half, far from a long prompt's last tokens, which may run at full depth.

    Args:
        prompt: Token ids.
        images: Where each image and video is in the prompt, from `Processor.locate`.
        rng: Decides where the passage begins.
    """
    edges = sorted([0, len(prompt), *chain.from_iterable((image.start, image.stop) for image in images)])
    stretch = max(map(range, edges[::2], edges[1::2]), key=len)
    length = len(stretch)
    size = min(LONGEST_PASSAGE, length // 4)
    if size < 2:
        return []
    begin = stretch.start + rng.randint(1, length // 2 - size)  # not the first token, which may be BOS
    return prompt[begin : begin + size]
