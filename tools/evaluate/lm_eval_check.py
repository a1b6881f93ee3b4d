"""Compare the adapter with lm-evaluation-harness itself: how it splits texts, and what a local task logs.

python -m tools.evaluate.lm_eval_check --model smollm2-135m --prune 0.4
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from pop.errors import InputError
from tools.common import exit_status
from tools.evaluate.lm_eval_pop import register
from tools.evaluate.scoring import rolling_windows

CONTEXTS = ("It is in", "Hello, the  \n", "a\n\n", "Question: 1\nAnswer:", "x ")
CONTINUATIONS = ("ter", " the", "\n", "  two  ", "12")
QUESTIONS = [{"question": f"{a} + {b} =", "choices": [str(a + b), "11", "x"], "answer": 0} for a, b in ((1, 2), (3, 4))]
TOLERANCE = 1e-3  # of a log-likelihood, in nats


def check(args: argparse.Namespace) -> None:
    """Print what was compared. Raises InputError for the first difference."""
    adapter = register()(name=args.model, prune=args.prune, dtype="float32", batch_size=2)
    check_pairs(adapter)
    check_windows()
    for is_chat in (False, True):
        check_task(adapter, is_chat)


def check_pairs(adapter) -> None:
    """Contexts and continuations are split as the harness splits them."""
    from lm_eval.api.model import TemplateLM

    theirs = SimpleNamespace(backend="causal", tok_encode=adapter.model.tokenizer.encode)
    for context, continuation in product(CONTEXTS, CONTINUATIONS):
        expected = TemplateLM._encode_pair(theirs, context, continuation)
        equal(f"{context!r} with {continuation!r}", adapter.encode_pair(context, continuation), expected)
    print(f"{len(CONTEXTS) * len(CONTINUATIONS)} pairs of a context and a continuation are split alike")


def check_windows() -> None:
    """Texts are cut into the windows of the harness."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in range(25):
        tokens = list(range(count))
        theirs = get_rolling_token_windows(tokens, prefix_token=99, max_seq_len=7, context_len=1)
        expected = [make_disjoint_window(window) for window in theirs]
        equal(f"the windows of {count} tokens", list(rolling_windows(tokens, 99, 7)), expected)
    print("texts of 0 to 24 tokens are cut into equal windows")


def check_task(adapter, is_chat: bool) -> None:
    """The log-likelihoods that the harness logs for a task of choices are those of `model.score`."""
    from lm_eval import simple_evaluate

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "questions.jsonl")
        file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
        task = {
            "task": "choice",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        found = simple_evaluate(model=adapter, tasks=[task], apply_chat_template=is_chat, bootstrap_iters=0)
    count = 0
    for sample in found["samples"]["choice"]:
        prompt = sample["doc"]["question"]
        if is_chat:
            prompt = adapter.apply_chat_template([{"role": "user", "content": prompt}])
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            expected = adapter.model.score(*adapter.encode_pair(prompt, choice if is_chat else f" {choice}"))
            logged = float(response[0][0])
            equal(f"{choice!r} after {str(prompt)!r}", math.isclose(logged, expected, abs_tol=TOLERANCE), True)
            count += 1
    print(f"{count} log-likelihoods of a task {'with' if is_chat else 'without'} a chat template are those of score")


def equal(what: str, found, expected) -> None:
    if found != expected:
        raise InputError(f"{what}: pop and the harness differ ({found} and {expected})")


def main() -> int:
    parser = argparse.ArgumentParser("tools.evaluate.lm_eval_check", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a name that `pop models` lists, or a folder")
    parser.add_argument("--prune", default="0.4", help="a share of the layers, or a saved plan")
    args = parser.parse_args()
    return exit_status("lm_eval_check", lambda: check(args))


if __name__ == "__main__":
    sys.exit(main())
