"""Exercises for distillation: prompts, and continuations that often have to be looked up in them.

In plain text most tokens follow from the few before them. So plain text teaches little about looking things up. Three
kinds of exercises take turns:

    text          a part of the user's texts
    repetition    a prompt from these texts, followed by passages of it, a line each
    table         a prompt with facts among its text, followed by the facts in another order and often another form
"""

import math
import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

from pop.calibration.held_out import repeated_passage
from pop.calibration.texts import Window, choose, excerpt, size_of, without_images
from pop.errors import InputError
from pop.inputs.processors import Prepared

KINDS = ("text", "repetition", "table", "text", "table")
ROWS = 8  # the most prompts in a batch; a prompt with images is alone
TOKENS_IN_BATCH = 4096  # the most tokens of a batch of several prompts
SHORTEST_PROMPT = 384  # tokens, of which a decided plan prunes half; the longest has as many as the longest window
CONTINUATION = 160  # tokens; at most a third of prompt and continuation
PASSAGE = (14, 40)  # tokens, from and to
FACTS = (5, 12)  # facts in a table, from and to; a fact is two words of the prompt and a value
SCATTERED = 0.6  # the share of tables whose facts are at places of their own, and not together
FORMS = (
    "The {0} of {1} is {2}.", "{0} {1} = {2}", "| {0} | {1} | {2} |", "{1}.{0}: {2}", "For {1}, set {0} to {2}.",
    '"{0} {1}": {2},', "Q: What is the {0} of {1}?\nA: {2}", '{{"call": "{0}", "with": {{"{1}": "{2}"}}}}',
)  # fmt: skip


class Exercise(NamedTuple):
    """A batch of prompts of equal lengths, with their continuations."""

    tokens: Tensor  # [B, T] ids, on the CPU
    cut: int  # where the continuations begin
    media: list[list[Prepared]]  # the images and videos of each prompt


def exercise(model, windows: Sequence[Window], number: int, rng: random.Random) -> Exercise:
    """Make exercise `number` from random parts of windows of text. A prompt too short for its kind stays text.

    The logarithms of prompt lengths are evenly spread, and a batch of shorter prompts has more of them.
    """
    kind = KINDS[number % len(KINDS)]
    ((tokens, media),) = choose(windows, 1, rng)
    if media:  # the window stays whole, and the continuation begins after its last image
        images = model.vision.locate(tokens, media)
        cut = max(len(tokens) - CONTINUATION, *(image.stop for image in images))
        length = min(CONTINUATION, model.max_seq_len - cut)
        row = _lookup(model, kind, tokens[:cut], length, images, rng)
        return Exercise(torch.tensor([row or tokens]), cut, [media])
    texts = without_images(windows)
    longest = max(map(size_of, texts))
    shortest = min(SHORTEST_PROMPT + CONTINUATION, longest)
    size = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))  # of a prompt and its continuation
    cut = size - min(CONTINUATION, size // 3)
    long_enough = [window for window in texts if size_of(window) >= size]
    count = min(ROWS, max(1, TOKENS_IN_BATCH // size))
    rows = []
    for tokens, _ in choose(long_enough, count, rng):
        text = excerpt(tokens, size, rng, model.config.bos_id)
        rows.append(_lookup(model, kind, text[:cut], size - cut, [], rng) or text)
    return Exercise(torch.tensor(rows), cut, [[]] * count)


def _lookup(model, kind: str, prompt: list[int], length: int, images: Sequence[range], rng) -> list[int]:
    """A prompt, and `length` tokens that can be looked up in it. Empty if the kind is text, or the prompt is too short.

    A prompt with images, or with too few words for a table, becomes a repetition.
    """
    asked = []
    if kind == "table" and not images:
        prompt, asked = _table(model, prompt, rng)
    if kind != "text" and not asked:
        asked = _repetition(model, prompt, length, images, rng)
    return prompt + list(islice(cycle(asked), length)) if asked else []


def _repetition(model, prompt: list[int], length: int, images: Sequence[range], rng) -> list[int]:
    """At least `length` tokens of passages of a prompt, a line each. Empty if the prompt is too short.

    In half of the exercises, one token of each passage becomes another one of the prompt, which stands for no image.
    """
    is_edited = rng.random() < 0.5
    others = [token for token in prompt if token not in model.vision.placeholders.values()]
    newline = [] if model.tokenizer is None else model.encode("\n", bos=False)
    lines = []
    while len(lines) < length:
        passage = repeated_passage(prompt, images, rng)
        if not passage:
            return []
        passage = passage[: rng.randint(*PASSAGE)]
        if is_edited:
            passage[rng.randrange(len(passage))] = rng.choice(others)
        lines += newline + passage
    return lines


def _words(model, prompt: list[int]) -> list[str]:
    """A prompt's different words of medium length. Empty without a tokenizer, or if it lacks a token of the prompt."""
    if model.tokenizer is None:
        return []
    try:
        text = model.tokenizer.decode(prompt)
    except InputError:  # there may be more embeddings than tokens
        return []
    return [word for word in dict.fromkeys(text.split()) if word.isalpha() and 3 < len(word) < 10]


def _table(model, prompt: list[int], rng) -> tuple[list[int], list[int]]:
    """A prompt with facts in place of its end, and tokens that ask for them: none if it has too few words."""
    words = _words(model, prompt)
    count = rng.randint(*FACTS)
    if len(words) < 3 * count:
        return prompt, []
    chosen = rng.sample(words, 3 * count)
    forms = rng.choices(FORMS, k=2)
    facts = [(*pair, _value(word, rng)) for *pair, word in zip(chosen[::3], chosen[1::3], chosen[2::3], strict=True)]
    lines = [model.encode(f"\n{forms[0].format(*fact)}\n", bos=False) for fact in facts]
    kept = len(prompt) - sum(map(len, lines))
    if kept < 1:
        return prompt, []
    if rng.random() < SCATTERED:
        places = [rng.randint(1, kept) for _ in facts]
    else:
        places = [rng.randint(1, kept)] * count
    text = prompt[:kept]
    for place, line in sorted(zip(places, lines, strict=True), reverse=True):
        text[place:place] = line
    form = rng.choice(forms)
    asked = []
    for fact in rng.sample(facts, count):
        asked += model.encode(f"\n{form.format(*fact)}", bos=False)
    return text, asked


def _value(word: str, rng) -> str:
    """A word, a number in one of several forms, or a list of digits."""
    number = rng.randrange(10**4, 10**5)
    digits = ", ".join(f"{number}")
    numbers = (f"{number}", f"{number % 1000}", f"{number / 100:.2f}", f"{number:x}")
    return rng.choice((*numbers, digits[:4], digits[:7], word, word))
