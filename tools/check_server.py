"""Does a plan hold where it is served? Ask a server the questions of `pop check`, with its plan and at full depth.

    python -m tools.check_server weights/llama3.1-8b-instruct                 # vLLM with POP_PLAN
    python -m tools.check_server smollm2-135m --server pop --questions 4      # tools.serve

It reads a tokenizer and no weights. So it also judges a plan on a GPU, and on weights that the server has quantised. An
answer is exact if the greedy text is the right one. Predictions are not compared, so there is no KL.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

import pop
from pop.calibration.questions import KINDS, Question, Writer, make_questions
from pop.calibration.texts import builtin_texts, parted, python_texts
from pop.calibration.verdict import Verdict
from pop.checkpoints.registry import find_folder
from pop.errors import InputError, check_count
from pop.inputs.chat import chat_format
from pop.system.progress import progress_bar
from tools.common import exit_status, integers_in, table

FULL_DEPTH = {"vllm": {"vllm_xargs": {"pop_plan": "none"}}, "pop": {"plan": "none"}}  # in a request
AT_ONCE = 4  # requests
SECONDS = 600  # that an answer may take


class Client:
    """Greedy answers of a server of the OpenAI protocol.

    Args:
        url: Where /models and /completions are.
        key: The API key, if the server wants one.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/")
        self.key = key
        self.model = self._asked("models")["data"][0]["id"]

    def answer(self, prompt: list[int], most: int, options: dict) -> str:
        """The text of at most `most` tokens after a prompt of token ids."""
        fields = {"model": self.model, "prompt": prompt, "max_tokens": most, "temperature": 0}
        return self._asked("completions", fields | options)["choices"][0]["text"]

    def _asked(self, route: str, fields: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = None if fields is None else json.dumps(fields).encode()
        try:
            request = urllib.request.Request(f"{self.url}/{route}", body, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise InputError(f"{self.url}/{route} answers {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.url}/{route} does not answer ({error}); is the server there?") from None


def questions_of(folder, lengths: list[int], per_kind: int, seed: int) -> tuple[dict[int, list[Question]], object]:
    """The questions by prompt length, about texts that no plan was fitted to, and the tokenizer in the folder."""
    tokenizer = pop.load_tokenizer(folder)
    model = SimpleNamespace(tokenizer=tokenizer, chat_format=lambda: chat_format(tokenizer))
    _, texts = parted(builtin_texts() + python_texts())
    text = [token for text in texts for token in tokenizer.encode(text, bos=False)]
    head = [token for token in tokenizer.encode("a")[:1] if token == tokenizer.bos_id]
    return make_questions(Writer(model, text, head, seed), list(KINDS), lengths, per_kind), tokenizer


def compare(client: Client, questions: dict[int, list[Question]], tokenizer, full_depth: dict) -> Verdict:
    """Ask everything with the server's plan and at full depth. The verdict has no loss."""
    asked = [(length, question) for length, group in questions.items() for question in group]

    def marks(pair: tuple[int, Question]) -> list[bool]:
        _, question = pair
        wanted = tokenizer.decode(question.answer).strip()
        answers = [client.answer(question.prompt, len(question.answer), options) for options in ({}, full_depth)]
        return [answer.strip() == wanted for answer in answers]

    exact = {}
    with ThreadPoolExecutor(AT_ONCE) as pool, progress_bar("asking", len(asked), "questions") as step:
        for (length, question), pair in zip(asked, pool.map(marks, asked), strict=True):
            exact.setdefault(question.kind, {}).setdefault(str(length), []).append(pair)
            step(1)
    return Verdict({}, {kind: {n: np.array(found) for n, found in cells.items()} for kind, cells in exact.items()})


def report(verdict: Verdict) -> str:
    """A row for each kind of question, a column for each length, and a sentence."""
    lengths = list(next(iter(verdict.exact.values())))
    rows = [["exact answers, plan / full depth", *(f"{int(length):,} tokens" for length in lengths)]]
    for kind, cells in verdict.exact.items():
        rows.append([kind, *("{} / {} of {}".format(*cell.sum(0), len(cell)) for cell in cells.values())])
    return f"{table(rows)}\n\n{verdict.sentence}\nKL is not compared."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with the tokenizer, or a name that `pop models` lists")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (%(default)s)")
    parser.add_argument("--key", help="the server's API key")
    parser.add_argument("--server", choices=FULL_DEPTH, default="vllm", help="how it is asked for full depth (vllm)")
    parser.add_argument(
        "--lengths", default="1024,4096", help="of the prompts, in tokens (%(default)s)", metavar="N,..."
    )
    parser.add_argument("--questions", type=int, default=12, help="of each kind at each length (12)", metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="decides the questions (0)", metavar="N")
    args = parser.parse_args(argv)

    def work() -> None:
        lengths = integers_in("--lengths", args.lengths)
        check_count("--questions", args.questions)
        check_count("--seed", args.seed, 0)
        questions, tokenizer = questions_of(find_folder(args.model), lengths, args.questions, args.seed)
        client = Client(args.url, args.key)
        print(report(compare(client, questions, tokenizer, FULL_DEPTH[args.server])))

    return exit_status("check_server", work)


if __name__ == "__main__":
    sys.exit(main())
