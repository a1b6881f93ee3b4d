"""Kinds of questions after RULER (Hsieh et al. 2024, arXiv 2404.06654): those whose data need no download.

`multikey` fills the prompt with sentences like that of the needle, each with its own key. `multivalue` gives one key
four numbers, and `multiquery` asks for the numbers of four keys. `variables` passes a number through a chain of
variables. `common` and `frequent` ask which word occurs most often: of words that occur equally often otherwise, and of
made-up words with frequencies after Zipf's law.

RULER scores free generation, and its answers to the last two list several words. Here, the answer is given token by
token (retrieval.py), and is one word. So the scores are not comparable with published ones.
"""

from __future__ import annotations

from pop.calibration.questions import Question
from tools.evaluate.questions import Writer

VALUES = 4  # numbers of a key in `multivalue`, and keys that `multiquery` asks for
HOPS = 3  # variables after the first in `variables`
ZIPF = 2.0  # the frequency of the n-th word in `frequent` is proportional to n^-ZIPF
RARE = 3  # how often words of `common` occur
COMMON = 8  # how many times as often the word that is asked for occurs


def spread(writer: Writer, count: int) -> list[float]:
    """Random depths in increasing order."""
    return sorted(writer.rng.random() for _ in range(count))


def multikey(writer: Writer, length: int, depth: float) -> Question:
    words = writer.words(length // 8)
    keys = dict(zip(words, writer.numbers(len(words)), strict=True))
    asking = "\nQuestion: What is the secret number of {0}?\nAnswer: The secret number of {0} is"
    longest = max((len(writer.encode(asking.format(word))) for word in words), default=0)
    room = length - len(writer.head) - longest - 4
    facts = []
    total = 0
    for word, number in keys.items():
        fact = f"The secret number of {word} is {number}.\n"
        total += len(writer.encode(fact))
        if total > room:
            break
        facts.append(fact)
    asked = words[round(depth * max(0, len(facts) - 1))]
    prompt = writer.prompt(length, facts, asking.format(asked), [1.0] * len(facts))
    return Question("multikey", prompt, writer.encode(f" {keys[asked]}"))


def multivalue(writer: Writer, length: int, depth: float) -> Question:
    (word,) = writer.words(1)
    numbers = writer.numbers(VALUES)
    facts = [f"\nA secret number of {word} is {number}.\n" for number in numbers]
    asking = f"\n\nQuestion: What are the secret numbers of {word}?\nAnswer: The secret numbers of {word} are"
    prompt = writer.prompt(length, facts, asking, spread(writer, VALUES))
    return Question("multivalue", prompt, *writer.listed([str(number) for number in numbers]))


def multiquery(writer: Writer, length: int, depth: float) -> Question:
    words = writer.words(VALUES)
    numbers = writer.numbers(VALUES)
    facts = [f"\nThe secret number of {word} is {number}.\n" for word, number in zip(words, numbers, strict=True)]
    named = ", ".join(words)
    asking = f"\n\nQuestion: What are the secret numbers of {named}?\nAnswer: The secret numbers of {named} are"
    prompt = writer.prompt(length, facts, asking, spread(writer, VALUES))
    return Question("multiquery", prompt, *writer.listed([str(number) for number in numbers]))


def variables(writer: Writer, length: int, depth: float) -> Question:
    names = [word.upper() for word in writer.words(1 + HOPS)]
    (number,) = writer.numbers(1)
    values = [str(number), *names[:-1]]
    facts = [f"\nVAR {name} = {value}\n" for name, value in zip(names, values, strict=True)]
    asking = f"\n\nQuestion: Which variables have the value {number}?\nAnswer: {len(names)} variables have it:"
    prompt = writer.prompt(length, facts, asking, spread(writer, len(names)))
    return Question("variables", prompt, *writer.listed(names))


def common(writer: Writer, length: int, depth: float) -> Question:
    asking = "\nQuestion: Which word is the most common in the list?\nAnswer: The most common word is"
    words = writer.words(max(2, length // (7 * RARE)))
    return _most_frequent("common", writer, length, asking, words, lambda n: RARE * (COMMON if n == 0 else 1))


def frequent(writer: Writer, length: int, depth: float) -> Question:
    asking = "\nQuestion: Which word appears most frequently?\nAnswer: The most frequent word is"
    return _most_frequent("frequent", writer, length, asking, writer.words(30), lambda n: length / (n + 1) ** ZIPF)


def _most_frequent(kind: str, writer: Writer, length: int, asking: str, words: list[str], weight) -> Question:
    """A list of words drawn by their weights, as many as fit. The first word is the answer."""
    room = length - len(writer.head) - len(writer.encode(asking)) - 2
    weights = [weight(n) for n in range(len(words))]
    drawn = writer.rng.choices(words, weights, k=max(1, room))
    sizes = {word: len(writer.encode(f" {word}")) for word in words}
    listed = ""
    total = 0
    for word in drawn:
        total += sizes[word]
        if total > room:
            break
        listed += f" {word}"
    prompt = writer.prompt(length, [listed], asking, [1.0])
    return Question(kind, prompt, writer.encode(f" {words[0]}"))


RULER = [multikey, multivalue, multiquery, variables, common, frequent]
