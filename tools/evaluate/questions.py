"""Questions that only the prompt can answer: codes, a needle, documents and quotations.

`codes` says what the labels on six things read, and asks for one of them.
`needle` hides one random number in a long text, and asks for it at the end.
`documents` states facts about invented persons in several documents, and asks for one of them.
`quotes-NAME` repeats the first tokens of a passage of the prompt, and asks for the rest. There is one kind for each
domain of test text, so code is quoted as well as prose.

Distillation trains on facts about words of the prompt (FORMS in pop/calibration/exercises.py), and on repeated
passages. So no question here but `quotes` has the form of an exercise. ruler.py has more kinds. Every prompt has
exactly the length that is asked for.
"""

from __future__ import annotations

import pop
from pop.calibration import questions
from pop.calibration.questions import CODES, COLOURS, THINGS, Maker, Question, quote

DOCUMENTS = 8
CUE = 8  # tokens of a quoted passage that the prompt repeats
QUOTED = 16  # tokens after them that are asked for


class Writer(questions.Writer):
    """A writer of pop/calibration/questions.py with several texts.

    Args:
        model: the model, with a tokenizer.
        texts: token ids of a long text for each domain. Short ones are repeated.
        seed: the seed of the questions.
    """

    def __init__(self, model: pop.Model, texts: dict[str, list[int]], seed: int):
        bos_id = model.tokenizer.bos_id
        filler = [token for tokens in texts.values() for token in tokens]
        super().__init__(model, filler, [] if bos_id is None else [bos_id], seed)
        self.texts = texts

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


def codes(writer: Writer, length: int, depth: float) -> Question:
    """The asked number is the one nearest to the depth."""
    everything = [f"{colour} {thing} {n}" for colour in COLOURS for thing in THINGS for n in range(1, 6)]
    names = writer.rng.sample(everything, CODES)
    numbers = writer.numbers(CODES)
    facts = [f"\nA label on the {name} reads {number}.\n" for name, number in zip(names, numbers, strict=True)]
    asked = round(depth * (CODES - 1))
    name = names[asked]
    asking = f"\n\nQuestion: What does the label on the {name} read?\nAnswer: A label on the {name} reads"
    return Question("codes", writer.prompt(length, facts, asking), writer.encode(f" {numbers[asked]}"))


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

    def make(writer: Writer, length: int, depth: float) -> Question:
        return quote(f"quotes-{domain}", writer, length, depth, writer.texts[domain], CUE, QUOTED)

    return make
