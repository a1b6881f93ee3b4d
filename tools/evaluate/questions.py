"""Questions that only the prompt can answer: codes, a needle, documents and quotations.

`codes` hides six sentences like "The code of the red box 3 is 52817." in a long text, and asks for one of them.
`needle` hides one random number in a long text, and asks for it at the end.
`documents` states facts about invented persons in several documents, and asks for one of them.
`quotes-NAME` repeats the first tokens of a passage of the prompt, and asks for the rest. There is one kind for each
domain of test text, so code is quoted as well as prose.

ruler.py has more kinds. Every prompt has exactly the length that is asked for.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from pop.errors import InputError

CODES = 6  # sentences with a code in a prompt
DOCUMENTS = 8
CUE = 8  # tokens of a quoted passage that the prompt repeats
QUOTED = 16  # tokens after them that are asked for
COLOURS = ["red", "blue", "green", "black", "white", "grey", "pink", "brown"]
THINGS = ["box", "door", "car", "shelf", "safe", "drawer"]


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and the answer that it holds.

    Args:
        kind: such as "codes".
        prompt: token ids.
        answer: token ids.
        counted: which tokens of the answer count, such as the numbers in a list of numbers. None: all.
    """

    kind: str
    prompt: list[int]
    answer: list[int]
    counted: list[bool] | None = None


class Writer:
    """What makers of questions share: a tokenizer, long texts and a random number generator.

    Args:
        tokenizer: the model's tokenizer.
        texts: token ids of a long text for each domain. Short ones are repeated.
        seed: the seed of the questions.
    """

    def __init__(self, tokenizer, texts: dict[str, list[int]], seed: int):
        self.tokenizer = tokenizer
        self.texts = texts
        self.rng = random.Random(seed)
        self.filler = [token for tokens in texts.values() for token in tokens]
        self.head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False)

    def cut(self, text: list[int], count: int) -> list[int]:
        """`count` consecutive tokens of `text` from a random place. After its end, the text begins again."""
        if count < 0:
            raise InputError("the prompts of retrieval are too short to hold their questions; ask for longer --lengths")
        begin = self.rng.randrange(len(text))
        return [text[(begin + index) % len(text)] for index in range(count)]

    def prompt(self, length: int, facts: list[str], asking: str, depths: list[float]) -> list[int]:
        """A prompt of `length` tokens: a long text with facts at increasing depths, from 0 to 1, and then `asking`."""
        encoded = [self.encode(fact) for fact in facts]
        question = self.encode(asking)
        used = len(self.head) + sum(map(len, encoded)) + len(question)
        text = self.cut(self.filler, length - used)
        prompt = list(self.head)
        begin = 0
        for fact, depth in zip(encoded, depths, strict=True):
            end = round(depth * len(text))
            prompt += text[begin:end] + fact
            begin = end
        return prompt + text[begin:] + question

    def numbers(self, count: int) -> list[int]:
        """Distinct numbers of five digits."""
        return self.rng.sample(range(10_000, 100_000), count)

    def words(self, count: int) -> list[str]:
        """Distinct words that no training text is about."""
        words: set[str] = set()
        while len(words) < count:
            syllables = (self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(3))
            words.add("".join(syllables).capitalize() + self.rng.choice("lnrs"))
        return self.rng.sample(sorted(words), count)

    def listed(self, items: list[str]) -> tuple[list[int], list[bool]]:
        """An answer that lists items, as " a, b, c", and which of its tokens are items."""
        comma = self.encode(",")
        answer = []
        counted = []
        for number, item in enumerate(items):
            if number:
                answer += comma
                counted += [False] * len(comma)
            tokens = self.encode(f" {item}")
            answer += tokens
            counted += [True] * len(tokens)
        return answer, counted


Maker = Callable[[Writer, int, float], Question]  # from a writer, a length in tokens, and a depth from 0 to 1


def codes(writer: Writer, length: int, depth: float) -> Question:
    """The asked sentence is the one nearest to the depth."""
    everything = [f"{colour} {thing} {n}" for colour in COLOURS for thing in THINGS for n in range(1, 6)]
    names = writer.rng.sample(everything, CODES)
    numbers = writer.numbers(CODES)
    asked = round(depth * (CODES - 1))
    facts = [f"\nThe code of the {name} is {number}.\n" for name, number in zip(names, numbers, strict=True)]
    asking = f"\n\nQuestion: What is the code of the {names[asked]}?\nAnswer: The code of the {names[asked]} is"
    prompt = writer.prompt(length, facts, asking, [(n + 0.5) / CODES for n in range(CODES)])
    return Question("codes", prompt, writer.encode(f" {numbers[asked]}"))


def needle(writer: Writer, length: int, depth: float) -> Question:
    (number,) = writer.numbers(1)
    asking = "\n\nQuestion: What is the secret number?\nAnswer: The secret number is"
    prompt = writer.prompt(length, [f"\nThe secret number is {number}.\n"], asking, [depth])
    return Question("needle", prompt, writer.encode(f" {number}"))


def documents(writer: Writer, length: int, depth: float) -> Question:
    """All documents are equally long. The asked one is the one nearest to the depth."""
    words = writer.words(3 * DOCUMENTS)
    names = [" ".join(words[n : n + 2]) for n in range(0, 2 * DOCUMENTS, 2)]
    towns = words[2 * DOCUMENTS :]
    asked = round(depth * (DOCUMENTS - 1))
    facts = []
    for number, (name, town) in enumerate(zip(names, towns, strict=True), start=1):
        facts.append(f"\n\nDocument {number}\n{name} lives in the town of {town}.\n")
    asking = f"\n\nQuestion: In which town does {names[asked]} live?\nAnswer: {names[asked]} lives in the town of"
    prompt = writer.prompt(length, facts, asking, [n / DOCUMENTS for n in range(DOCUMENTS)])
    return Question("documents", prompt, writer.encode(f" {towns[asked]}"))


def quotes(domain: str) -> Maker:
    """Quotations from the text of a domain: the passage nearest to the depth that its cue decides."""

    def quote(writer: Writer, length: int, depth: float) -> Question:
        asking = writer.encode("\n\nThe same passage again:\n")
        text = writer.cut(writer.texts[domain], length - len(writer.head) - len(asking) - CUE)
        room = len(text) - CUE - QUOTED
        if room < 0:
            writer.cut(text, -1)
        nearest = sorted(range(room + 1), key=lambda begin: abs(begin - round(depth * room)))
        begin = next((begin for begin in nearest if _is_clear(text, begin)), None)
        if begin is None:
            raise InputError(f"the text {domain!r} only repeats itself, so nothing in it can be quoted; give another")
        passage = text[begin : begin + CUE + QUOTED]
        return Question(f"quotes-{domain}", writer.head + text + asking + passage[:CUE], passage[CUE:])

    return quote


def _is_clear(text: list[int], begin: int) -> bool:
    """Whether the passage from `begin` on follows its cue wherever `text` has the cue."""
    passage = text[begin : begin + CUE + QUOTED]
    same = [at for at, token in enumerate(text) if token == passage[0] and text[at : at + CUE] == passage[:CUE]]
    return all(text[at : at + CUE + QUOTED] == passage for at in same)


def make_questions(writer: Writer, makers: list[Maker], lengths: list[int], per_kind: int) -> dict[int, list[Question]]:
    """`per_kind` questions of each kind at each length, with answers from the beginning of the prompt to its end."""
    depths = [(n + 0.5) / per_kind for n in range(per_kind)]
    questions = {}
    for length in lengths:
        questions[length] = [make(writer, length, depth) for make in makers for depth in depths]
    return questions
