"""`pop.check`: whether prompts encoded with a plan serve as well as prompts at full depth.

Two things are compared with the full model, at several prompt lengths: the predictions of what follows in texts, and
exact answers to questions about the prompt (questions.py). A low loss alone does not show that a model can still look
things up in its prompt. Both are given token by token, so both models see the same tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pop.calibration.questions import KINDS, Question, Writer, make_questions, quotations
from pop.calibration.texts import SHORTEST, TOKENS_AT_ONCE, as_list, default_texts, head_of, parted
from pop.engine.modes import engine_modes
from pop.errors import InputError, check_count, some
from pop.generation.sampling import check_finite
from pop.model import check_model
from pop.pruning.plan import PrunePlan
from pop.runner import FULL_DEPTH, padded
from pop.system.progress import progress_bar

LENGTHS = (512, 1024, 4096)  # tokens of a prompt. Plans that pop.calibrate decides prune no shorter ones
LONG = 2048  # tokens; longer prompts take so much time that half as many questions are asked about each
CONTINUATION = 96  # tokens after a prompt, and the most tokens of an answer
MOST_WINDOWS = 8  # of text that loss is measured on at a length, if the text has so many
MOST_KL = 0.03  # nats a token
LEAST_KEPT = 0.95  # of the full model's exact answers
FEWEST = 3  # exact answers of the full model, without which a kind does not count
SAMPLES = 2000  # of the bootstrap
# The rows of a table: their names, what they show of a verdict's loss, and how.
LOSSES = (
    ("KL, nats a token", "kl", ".4f"),
    ("KL of the first token", "first", ".4f"),
    ("same likeliest token", "same", ".1%"),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a plan keeps of the full model. `str` gives a table and a sentence.

    Args:
        loss: By prompt length: "kl", KL(full || plan) in nats a token; "first", that of the first token;
            and "same", the share of tokens at which both models have the same likeliest token.
        exact: By kind of question and prompt length, as in ("codes", 512): whether the answers by the plan and by the
            full model are exact, [N, 2] bool.
    """

    loss: dict[int, dict[str, float]]
    exact: dict[tuple[str, int], np.ndarray]

    @property
    def holds(self) -> bool:
        """Whether no limit is missed, see `failures`."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """What misses a limit, and by how much. A share of answers misses it if its whole interval is below it."""
        found = []
        everything = self._everything()
        if _keeps_too_few(everything):
            found.append(f"of all exact answers it keeps {_as_text(everything)}")
        for (kind, length), exact in self.exact.items():
            if _keeps_too_few(exact):
                found.append(f"{kind} at {length} tokens keep {_as_text(exact)}")
        for length, figures in self.loss.items():
            if figures["kl"] > MOST_KL:
                found.append(f"KL at {length} tokens is {figures['kl']:.3g}, above {MOST_KL}")
        return found

    @property
    def unjudged(self) -> list[str]:
        """The kinds of question, and the lengths, of which the full model has too few exact answers."""
        return [f"{kind} at {length} tokens" for (kind, length), exact in self.exact.items() if not _is_enough(exact)]

    @property
    def sentence(self) -> str:
        """Whether the plan holds, and otherwise what does not."""
        everything = self._everything()
        kept = "; the full model has no exact answer, so only the KL counts"
        if everything[:, 1].any():
            kept = f"; of all exact answers it keeps {_as_text(everything)}"
        if _keeps_too_few(everything):
            kept = ""  # that is the first of the failures
        said = "holds at each length and for each kind of question"
        if self.failures:
            said = f"does not hold: {some(self.failures, '; ')}"
        elif self.unjudged:
            said = f"holds, but the full model has too few exact answers to judge {some(self.unjudged)}"
        return f"The plan {said}{kept}."

    def record(self) -> dict:
        """The verdict for a plan's record. JSON makes texts of the lengths."""
        answers = {}
        for (kind, length), exact in self.exact.items():
            answers.setdefault(kind, {})[length] = _counts(exact)
        return {
            "holds": self.holds,
            "sentence": self.sentence,
            "loss": self.loss,
            "answers": answers,
            "kept": _kept(self._everything()),
        }

    def __str__(self) -> str:
        return table(self.record())

    def _everything(self) -> np.ndarray:
        return np.concatenate([*self.exact.values()])


@engine_modes()
def check(
    model,
    plan: PrunePlan,
    texts: Sequence[str | Sequence[int]] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    questions: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> Verdict:
    """Compare a plan with the full model, on texts and on questions.

    Args:
        model: A pop.Model. Without a tokenizer, quotations are the only questions.
        plan: A PrunePlan, or another value of `prune` in `load`.
        texts: Strings or lists of token ids to which the plan was not fitted. None takes the last fifths of the
            built-in texts and of Python's, which pop.calibrate(texts=None) leaves for this. For the loss, these are
            appended to texts that together are shorter than a prompt. For questions, short texts are repeated.
        lengths: Of the prompts, in tokens. Longer ones than the model's context allows are cut to it. Those that the
            plan does not prune are left out.
        questions: Of each kind at each length. Half as many are asked about prompts of more than 2,048 tokens.
        seed: Decides the questions.
        progress: Show a bar on stderr.

    Raises:
        InputError: Texts or lengths are too short, the plan prunes no prompt of these lengths, or the logits are not
            finite. PlanError: The plan does not fit.
    """
    check_model(model)
    plan = model.resolve(plan)
    work = compared(model, texts, lengths, questions, seed, least=plan.full_depth_below)
    total = sum(length * (len(windows) + len(asked)) for length, windows, asked in work)
    loss = {}
    exact = {}
    with progress_bar("checking", total, "tokens", progress) as step:
        for length, windows, asked in work:
            differences = []
            for window in windows:
                prompt = [window[:length]]
                following = [window[length:]]
                full = _logits(model, prompt, following, FULL_DEPTH)[0]
                differences.append(_difference(full, _logits(model, prompt, following, plan)[0]))
                step(length)
            kl, same = torch.stack(differences, dim=1)  # [windows, C] each
            figures = {"kl": kl.mean(), "first": kl[:, 0].mean(), "same": same.mean()}
            loss[length] = {name: round(value.item(), 6) for name, value in figures.items()}
            rows = max(1, TOKENS_AT_ONCE // length)
            for begin in range(0, len(asked), rows):
                batch = asked[begin : begin + rows]
                by_plan = _exact(model, batch, plan)
                by_full = _exact(model, batch, FULL_DEPTH)
                for question, *marks in zip(batch, by_plan, by_full, strict=True):
                    exact.setdefault((question.kind, length), []).append(marks)
                step(length * len(batch))
    return Verdict(loss, {cell: np.array(marks) for cell, marks in exact.items()})


def compared(
    model, texts, lengths, questions=12, seed=0, *, least: int = 0
) -> list[tuple[int, list[list[int]], list[Question]]]:
    """What `check` compares at each length from `least` on: windows of text, and questions. Raises as `check`."""
    most = model.max_seq_len - CONTINUATION
    lengths = {min(check_count("a length", length, SHORTEST), most) for length in lengths}
    lengths = sorted(length for length in lengths if length >= least)
    if not lengths:
        raise InputError(
            f"lengths has none of at least {max(least, SHORTEST)} tokens, so nothing is compared; give a longer one "
            f"(this model takes {most} at most)"
        )
    head, text = _joined(model, texts)
    more = []  # follows a text that is shorter than a prompt
    if model.tokenizer is not None and len(text) < lengths[-1] + CONTINUATION:
        more = _joined(model, None)[1]
    writer = Writer(model, text, head, check_count("seed", seed, 0))
    makers = (quotations,) if model.tokenizer is None else KINDS
    check_count("questions", questions)
    work = []
    for length in lengths:
        count = questions if length <= LONG else (questions + 1) // 2
        asked = make_questions(writer, makers, length, count)
        long_enough = text if len(text) >= length + CONTINUATION else text + more
        work.append((length, _windows(head, long_enough, length), asked))
    return work


def _joined(model, texts) -> tuple[list[int], list[int]]:
    """BOS, if the texts begin with it, and the token ids of all texts after it."""
    if texts is None:
        _, texts = parted(default_texts(model))
    rows = [model.encode(text, "text") for text in as_list(texts)]
    text = []
    for row in rows:
        head = head_of(row, model.config.bos_id)
        text += row[len(head) :]
    if len(text) < SHORTEST:
        raise InputError(f"the texts have {len(text)} tokens, but a check needs {SHORTEST}; give longer ones")
    return head_of(rows[0], model.config.bos_id), text


def _windows(head: list[int], text: list[int], length: int) -> list[list[int]]:
    """Prompts of `length` tokens with their continuations, evenly spread over a text. It is repeated if need be."""
    size = length + CONTINUATION - len(head)
    text = text * -(-size // len(text))
    count = min(MOST_WINDOWS, len(text) // size)
    begins = [(len(text) - size) * number // max(1, count - 1) for number in range(count)]
    return [head + text[begin : begin + size] for begin in begins]


def _logits(model, prompts: list[list[int]], following: list[list[int]], plan: PrunePlan) -> Tensor:
    """The logits [B, C, V] that predict what follows prompts of equal lengths. Rows are padded to C on the right."""
    tokens, _ = padded(following)  # [B, C]
    cache = model.new_cache(len(prompts), len(prompts[0]) + tokens.shape[1])
    logits = model.prefill(prompts, cache, plan=plan)[:, None]  # [B, 1, V]
    if tokens.shape[1] > 1:
        logits = torch.cat((logits, model.extend(tokens[:, :-1], cache)), dim=1)
    check_finite(logits.amax(-1), "logits")
    return logits


def _difference(full: Tensor, logits: Tensor) -> Tensor:
    """KL(full || plan), and whether the likeliest token is the same, for logits [C, V] each: [2, C]."""
    kl = F.kl_div(logits.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    same = full.argmax(-1) == logits.argmax(-1)
    return torch.stack((kl.clamp(min=0), same)).double().cpu()  # rounding can leave a KL just below 0


def _exact(model, questions: list[Question], plan: PrunePlan) -> list[bool]:
    """Whether each greedy token of the answers is right, after the right ones before it."""
    best = _logits(model, [q.prompt for q in questions], [q.answer for q in questions], plan).argmax(-1)  # [B, C]
    return [row[: len(q.answer)] == q.answer for q, row in zip(questions, best.tolist(), strict=True)]


def _kept(exact: np.ndarray) -> list[float] | None:
    """The share of the full model's exact answers that a plan has, and its 95 % interval: [N, 2] -> 3 numbers.

    The interval is from a paired bootstrap over the questions. None if the full model has no exact answer.
    """
    if not exact[:, 1].any():
        return None
    rows = np.random.default_rng(0).integers(len(exact), size=(SAMPLES, len(exact)))
    plan, full = exact[rows].sum(1).T  # [SAMPLES] each
    low, high = np.percentile(plan[full > 0] / full[full > 0], (2.5, 97.5))
    plan, full = exact.sum(0)
    return [round(float(share), 4) for share in (plan / full, low, high)]


def _is_enough(exact: np.ndarray) -> bool:
    """Whether the full model has enough exact answers to judge a plan by them."""
    return exact[:, 1].sum() >= FEWEST


def _keeps_too_few(exact: np.ndarray) -> bool:
    """Whether the whole interval is below the limit."""
    return _is_enough(exact) and _kept(exact)[2] < LEAST_KEPT


def _counts(exact: np.ndarray) -> list[int | float]:
    """Exact answers by the plan and by the full model, questions, and the interval of what is kept if it counts."""
    counts = [*exact.sum(0).tolist(), len(exact)]
    return counts + _kept(exact)[1:] if _is_enough(exact) else counts


def _as_text(exact: np.ndarray) -> str:
    return "{:.0%} [{:.1%}, {:.1%}] of the full model's".format(*_kept(exact))


def table(record: dict) -> str:
    """A verdict's record as a table, the full model beside the plan, and its sentence."""
    rows = {"exact answers, plan / full model": [f"{int(length):,} tokens" for length in record["loss"]]}
    for kind, by_length in record["answers"].items():
        rows[kind] = [*map(_cell, by_length.values())]
    for name, key, form in LOSSES:
        rows[name] = [f"{figures[key]:{form}}" for figures in record["loss"].values()]
    lines = [f"{name:34}" + "".join(f"{cell:>26}" for cell in cells) for name, cells in rows.items()]
    return "\n".join([*lines, "", record["sentence"]])


def _cell(counts: list[int | float]) -> str:
    plan, full, asked, *interval = counts
    note = "" if full >= FEWEST else " (too few)"
    if interval:
        note = " [{:.0%}, {:.0%}]".format(*interval)
    return f"{plan} / {full} of {asked}{note}"
