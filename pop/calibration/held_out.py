"""The loss by which calibration chooses: KL(full || pruned) on held-out text, of its continuation and of a repetition.

A low KL of a continuation does not show that a model can still look things up in its prompt. A repeated passage shows
it: the full model copies it from the prompt almost surely, whatever the text is.

    prompt: passage inside            continuation      the passage again
    ─────────[///////]─────────────┊────────────────┊[cue][//counted//]
           by the plan             ┊           at full depth
"""

import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pop.calibration.student import first_layer, student, teacher
from pop.inputs.processors import Prepared
from pop.pruning.plan import PrunePlan

JUDGED = 384  # the most tokens of a held-out window that are used: two thirds as the prompt
PASSAGE = 64  # the most tokens of a repeated passage
CUE = 8  # an eighth of a passage is its cue, after which the model can know what follows

Window = tuple[list[int], list[Prepared]]  # token ids, and the images and videos among them
# KL at each token of a window's continuation, and of its repetition, and whether each of the latter is copied
Compared = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Losses(NamedTuple):
    """What a plan loses, over all tokens of all windows."""

    continuation: float  # KL(full || pruned), in nats a token
    repetition: float  # likewise, of repeated passages after their cues; 0 if no window is long enough
    copied: float  # the share of these tokens that are the pruned model's likeliest

    @property
    def mean(self) -> float:
        """The loss to minimise: both kinds of text weigh the same."""
        return (self.continuation + self.repetition) / 2


class Judge:
    """The losses of plans on windows of text.

    The prompt is two thirds of a window's first 384 tokens, or more up to its last image. The next 128 tokens are the
    continuation. A passage of the prompt follows, again.

    The h that enters a plan's `first_layer` is kept. One full pass gives it for `plans`; others need one each.
    """

    @torch.no_grad()
    def __init__(self, model, windows: list[Window], plans: Sequence[PrunePlan] = ()):
        self.model, self.windows, self.cases = model, windows, []
        rng = random.Random(0)
        for tokens, media in windows:
            images = model.vision.locate(tokens, media)
            cut = max([min(len(tokens), JUDGED) * 2 // 3, *(image[-1] + 1 for image in images)])
            prompt, continuation = tokens[:cut], tokens[cut : max(JUDGED, cut + JUDGED // 3)]
            passage = repeated_passage(prompt, images, rng)
            if (room := model.max_seq_len - cut - len(passage)) < 0:  # after an image
                passage, room = [], len(continuation)
            continuation = continuation[:room]
            tokens = torch.tensor([prompt + continuation + passage[:-1]])
            shown = model.vision.images(model.module, [media], tokens, torch.tensor([tokens.shape[1]]))
            entering, h = teacher(model.module, tokens.to(model.device), shown, {first_layer(plan) for plan in plans})
            full = model.module.head(h[0, cut - 1 :]).log_softmax(-1)
            self.cases.append((prompt, continuation, passage, (tokens, shown, entering), full))

    def losses(self, plan: PrunePlan) -> Losses:
        return pooled(self.compare(plan))

    @torch.no_grad()
    def compare(self, plan: PrunePlan) -> list[Compared]:
        """The tokens of each window by a plan."""
        compared, plan = [], self.model.resolve(plan)
        for prompt, continuation, passage, shared, full in self.cases:
            pruned = self._log_probs(plan, len(prompt), *shared) if plan.layers else full
            kl = F.kl_div(pruned, full, log_target=True, reduction="none").sum(-1)  # [N + 1]
            cue = max(1, len(passage) // CUE)
            at = len(continuation) + cue  # where the first token to copy is predicted
            targets = torch.tensor(passage[cue:], dtype=torch.int64, device=pruned.device)
            copied = pruned[at : at + len(targets)].argmax(-1) == targets
            compared.append((kl[: len(continuation) + 1], kl[at : at + len(targets)], copied))
        return compared

    def _log_probs(self, plan: PrunePlan, cut: int, tokens, images, entering: dict[int, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities [N + 1, V] of the N tokens after the prompt, and of the next one."""
        module, first = self.model.module, first_layer(plan)
        if first not in entering:
            entering |= teacher(module, tokens.to(self.model.device), images, [first])[0]
        return module.head(student(module, plan, entering[first], cut, images)[0, cut - 1 :]).log_softmax(-1)


def pooled(compared: Sequence[Compared]) -> Losses:
    """The means over all tokens of all windows."""
    parts = (torch.cat(part).double() for part in zip(*compared, strict=True))
    return Losses(*(part.sum().item() / max(1, len(part)) for part in parts))


def repeated_passage(prompt: Sequence[int], images: Sequence[range], rng: random.Random) -> list[int]:
    """A passage of a prompt that can follow it again, to test or to train copying from the prompt.

    It is a quarter of the prompt's longest stretch of text, at most 64 tokens, or empty if that has less than 8 tokens.
    It comes from the stretch's first half, far from a long prompt's last tokens, which may run at full depth.

    Args:
        prompt: Token ids.
        images: Where each image and video is in the prompt, from `Processor.locate`.
        rng: Decides where the passage begins.
    """
    ends = chain.from_iterable((image.start, image.stop) for image in sorted(images, key=lambda image: image.start))
    edges = [0, *ends, len(prompt)]
    begin, end = max(zip(edges[::2], edges[1::2], strict=True), key=lambda text: text[1] - text[0])
    size = min(PASSAGE, (end - begin) // 4)
    if size < 2:
        return []
    begin += rng.randint(1, (end - begin) // 2 - size)  # not the first token, which may be BOS
    return list(prompt[begin : begin + size])
