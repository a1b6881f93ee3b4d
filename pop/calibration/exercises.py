"""Exercises for distillation: prompts, and continuations that often have to be looked up in them.

In plain text most tokens follow from the few before them, so it teaches little about looking things up. There are
three kinds of exercises, in turn:

    text          a part of the user's texts
    repetition    a prompt of these texts, and then passages of it again, a line each
    table         a prompt with facts among the text, and then the facts again, in another order and often another form
"""

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch

from pop.calibration.judge import Window, repeated_passage
from pop.errors import InputError
from pop.inputs.processors import Prepared

KINDS = ("text", "repetition", "table", "text", "table")
ROWS = 4  # prompts in a batch; a prompt with images is alone
PROMPTS = (256, 320, 384, 448)  # tokens
CONTINUATION = 160  # tokens; at most a third of prompt and continuation
PASSAGE = (14, 40)  # tokens, from and to
FACTS = (5, 12)  # in a table, from and to: two words of the prompt and a random value each
FORMS = (
    "The {0} of {1} is {2}.", "{0} {1} = {2}", "| {0} | {1} | {2} |", "{1}.{0}: {2}", "For {1}, set {0} to {2}.",
    '"{0} {1}": {2},', "Q: What is the {0} of {1}?\nA: {2}",
)  # fmt: skip


class Exercise(NamedTuple):
    """A batch of prompts of equal lengths, with their continuations."""

    tokens: torch.Tensor  # [B, T] ids, on the CPU
    cut: int  # where the continuations begin
    media: list[list[Prepared]]  # the images and videos of each prompt


def exercise(model, windows: Sequence[Window], number: int, rng: random.Random) -> Exercise:
    """Make exercise `number` from random parts of windows of text. A prompt that is unfit for its kind stays text."""
    kind, size = KINDS[number % len(KINDS)], rng.choice(PROMPTS) + CONTINUATION
    (window,) = _choose(windows, 1, rng)
    if window[1]:
        tokens, images = window[0], model.vision.locate(*window)
        cut = max(len(tokens) - CONTINUATION, *(image.stop for image in images))
        rows = [_row(model, kind, tokens, cut, min(CONTINUATION, model.max_seq_len - cut), images, rng)]
        return Exercise(torch.tensor(rows), cut, [window[1]])
    size = min(size, len(window[0]))
    cut, rows = size - min(CONTINUATION, size // 3), []
    long = [window for window in windows if len(window[0]) >= size and not window[1]]
    for tokens, _ in [window, *_choose(long, ROWS - 1, rng)]:
        begin, bos = rng.randint(0, len(tokens) - size), int(tokens[0] == model.config.bos_id)
        rows.append(_row(model, kind, tokens[:bos] + tokens[begin + bos : begin + size], cut, size - cut, [], rng))
    return Exercise(torch.tensor(rows), cut, [[]] * ROWS)


def _choose(windows: Sequence[Window], count: int, rng: random.Random) -> list[Window]:
    return rng.choices(windows, [len(tokens) for tokens, _ in windows], k=count)


def _row(model, kind: str, text: list[int], cut: int, length: int, images: Sequence[range], rng) -> list[int]:
    """The text, or its first `cut` tokens with `length` tokens to look up in them."""
    prompt, found = text[:cut], []
    if kind == "table" and not images and (words := _words(model, prompt)) is not None:
        prompt, found = _table(model, prompt, words, rng)
    elif kind != "text":
        newline = [] if model.tokenizer is None else model.encode("\n", bos=False)
        while len(found) < length and (passage := repeated_passage(prompt, images, rng)):
            found += newline + passage[: rng.randint(*PASSAGE)]
    return prompt + list(islice(cycle(found), length)) if found else text


def _words(model, prompt: list[int]) -> list[str] | None:
    """A prompt's different words of medium length. None if there is no tokenizer, or it lacks a token of the prompt."""
    try:
        words = None if model.tokenizer is None else dict.fromkeys(model.tokenizer.decode(prompt).split())
    except InputError:  # there may be more embeddings than tokens
        words = None
    return words and [word for word in words if word.isalpha() and 3 < len(word) < 10]


def _table(model, prompt: list[int], words: list[str], rng) -> tuple[list[int], list[int]]:
    """A prompt with facts in place of its end, and what asks for them, which is empty if it has too few words."""
    count = rng.randint(*FACTS)
    if len(words) < 2 * count:
        return prompt, []
    words, forms = rng.sample(words, 2 * count), rng.choices(FORMS, k=2)
    facts = [(*pair, _value(rng)) for pair in zip(words[::2], words[1::2], strict=True)]
    lines = [model.encode(f"\n{forms[0].format(*fact)}\n", bos=False) for fact in facts]
    kept = len(prompt) - sum(map(len, lines))
    if kept < 1:
        return prompt, []
    places = [rng.randint(1, kept) for _ in facts] if rng.random() < 0.6 else [rng.randint(1, kept)] * count
    text = prompt[:kept]
    for place, line in sorted(zip(places, lines, strict=True), reverse=True):
        text[place:place] = line
    form = rng.choice(forms)
    asked = [f"\n{form.format(*fact)}" for fact in rng.sample(facts, count)]
    return text, [token for line in asked for token in model.encode(line, bos=False)]


def _value(rng) -> str:
    number = rng.randrange(10**4, 10**5)
    return rng.choice((f"{number}", f"{number % 1000}", f"{number / 100:.2f}", f"{number:x}"))
