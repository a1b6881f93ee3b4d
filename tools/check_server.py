"""Does a plan hold where it is served? Ask a server the questions of `pop check`, with its plan and at full depth.

    python -m tools.check_server weights/llama3.1-8b-instruct       # of tools.serve, or of vLLM with POP_PLAN
    python -m tools.check_server smollm2-135m --questions 4
    python -m tools.check_server smollm2-135m --cached              # each text is in the cache
    python -m tools.check_server smollm2-135m --text my.txt         # about your text

With --cached, the server has each prompt but for its last tokens, the question, before it gets the whole prompt. Then
vLLM selects no tokens of the text for the question, and tools.serve does. vLLM tells what it took from its cache only
if it runs with --enable-prompt-tokens-details.

It reads a tokenizer and no weights. So it also judges a plan on a GPU, and on weights that the server has quantised. An
answer is exact if the greedy text is the right one, but for spaces around it. Predictions are not compared: no KL.
The exit status is 1 if the plan does not hold, and 2 if nothing was judged. tools.serve tells if it has pruned nothing.
vLLM's counters do: there, a line below the table says if no question tells the plan from full depth.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

import pop
from pop.calibration.questions import KINDS, Question, Writer, make_questions
from pop.calibration.texts import builtin_texts, parted, python_texts
from pop.calibration.verdict import Verdict
from pop.checkpoints.registry import find_folder
from pop.cli.texts import Text, encoded, read_text
from pop.errors import InputError, check_count
from pop.inputs.chat import chat_format
from pop.system.progress import progress_bar
from tools.common import exit_status, integers_in, table

KEY = os.environ.get("POP_API_KEY") or os.environ.get("VLLM_API_KEY")
LOCAL = ("127.0.0.1", "localhost", "::1")  # hosts that are asked without a proxy
AT_ONCE = 4  # requests
SECONDS = 600  # that an answer may take
ROOM = 96  # tokens for an answer
ASKED = 64  # tokens at the end of a prompt that are not in the cache: more than most questions have


class Refused(InputError):
    """The server refuses a request."""


class Client:
    """Greedy answers of a server of the OpenAI protocol.

    Args:
        url: Where /models and /completions are.
        key: The API key, if the server wants one.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/")
        self.key = key
        try:
            is_local = urllib.parse.urlsplit(url).hostname in LOCAL
        except ValueError:
            raise InputError(f"{url} is no address; write one as in http://127.0.0.1:8000/v1") from None
        self.opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * is_local)
        self.details: list[dict] = []  # what the server tells of each prompt's tokens
        self.about = self._asked("models", read=lambda found: {"max_model_len": None} | found["data"][0])

    def answer(self, prompt: list[int], most: int, options: dict) -> str:
        """The text of at most `most` tokens after a prompt of token ids."""
        fields = {"model": self.about["id"], "prompt": prompt, "max_tokens": most, "temperature": 0}
        text, details = self._asked("completions", fields | options, read=text_and_details)
        self.details.append(details)
        return text

    def chat(self, request: dict) -> str:
        """The text of the answer to a request with messages, and the calls of tools in it."""
        fields = request | {"model": self.about["id"], "temperature": 0}
        text, details = self._asked("chat/completions", fields, read=lambda found: (said(found), details_of(found)))
        self.details.append(details)
        return text

    def check_lengths(self, lengths: list[int]) -> None:
        """Raise InputError if the longest prompts do not fit."""
        most = self.about["max_model_len"]
        if most is not None and max(lengths) + ROOM > most:
            longest = f"prompts of {max(lengths)} tokens and their answers"
            raise InputError(f"{longest} exceed the server's {most}; give shorter --lengths")

    def plan(self, name: str) -> dict:
        """What a request says to get a plan: of tools.serve, or otherwise of vLLM. "none" is full depth."""
        if self.about.get("owned_by") == "pop":
            return {"plan": name}
        return {"vllm_xargs": {"pop_plan": name}}

    def check_plans(self) -> None:
        """Raise InputError if the server ignores the plan of a request."""
        try:
            self.answer([0, 1, 2], 1, self.plan("?"))  # refused by a server that reads it
        except Refused as error:
            if "plan" in str(error):
                return
            raise
        raise InputError("the server ignores the plan of a request, so nothing can be compared; does it run a plan?")

    def _asked(self, route: str, fields: dict | None = None, *, read):
        """What `read` takes from the JSON of an answer."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = None if fields is None else json.dumps(fields).encode()
        try:
            request = urllib.request.Request(f"{self.url}/{route}", body, headers)
            with self.opener.open(request, timeout=SECONDS) as response:
                return read(json.load(response))
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            kind = Refused if error.code in (400, 404, 422) else InputError
            raise kind(f"{self.url}/{route} answers {error.code}: {said}") from None
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{self.url}/{route} answers with other JSON than OpenAI's ({error!r})") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise InputError(f"{self.url}/{route} does not answer ({error!r}); is the server there?") from None


def text_and_details(found: dict) -> tuple[str, dict]:
    """The text of an answer, and what the server tells of its prompt's tokens."""
    return found["choices"][0]["text"] + "", details_of(found)


def details_of(found: dict) -> dict:
    """What the server tells of the tokens of an answer's prompt."""
    usage = found.get("usage") or {}
    return usage.get("prompt_tokens_details") or {}


def said(found: dict) -> str:
    """The thoughts and the text of a chat's answer, and its calls of tools without their ids."""
    message = found["choices"][0]["message"]
    thoughts = message.get("reasoning") or message.get("reasoning_content") or ""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    written = "".join(f"{call['name']}({call['arguments']})" for call in calls)
    return thoughts + (message.get("content") or "") + written


def is_never(details: list[dict], name: str) -> bool:
    """Whether a server tells how many tokens of a kind prompts have, and none has any."""
    told = [one[name] for one in details if one.get(name) is not None]
    return bool(told) and not any(told)


def questions_of(
    folder, lengths: list[int], per_kind: int, seed: int, texts: list[Text]
) -> tuple[dict[int, list[Question]], object]:
    """The questions by prompt length, about these texts or conversations, and the tokenizer in the folder.

    Without texts, they are about parts of the built-in ones, and of Python's, that no plan was fitted to.
    """
    tokenizer = pop.load_tokenizer(folder)
    model = SimpleNamespace(tokenizer=tokenizer, chat_format=lambda: chat_format(tokenizer))
    given = [one for text in texts for one in encoded(model, text)]
    if not given:
        _, given = parted(builtin_texts() + python_texts())
    head = [token for token in tokenizer.encode("a")[:1] if token == tokenizer.bos_id]
    text = []
    for one in given:
        row = tokenizer.encode(one, bos=False) if isinstance(one, str) else one
        text += row[len(head) :] if row[: len(head)] == head else row  # a prompt has one BOS
    writer = Writer(model, text, head, seed)
    return {length: make_questions(writer, KINDS, length, per_kind) for length in lengths}, tokenizer


def compare(
    client: Client, questions: dict[int, list[Question]], tokenizer, full_depth: dict, cached: bool = False
) -> Verdict:
    """Ask everything with the server's plan and at full depth. The verdict has no loss.

    cached: Whether the server gets each prompt without its last tokens first.
    """
    asked = [(length, question) for length, group in questions.items() for question in group]

    def marks(pair: tuple[int, Question]) -> list[bool]:
        _, question = pair
        wanted = tokenizer.decode(question.answer).strip()
        answers = []
        for options in ({}, full_depth):
            if cached:
                client.answer(question.prompt[:-ASKED], 1, options)
            answers.append(client.answer(question.prompt, len(question.answer), options))
        return [answer.strip() == wanted for answer in answers]

    exact = {}
    with ThreadPoolExecutor(AT_ONCE) as pool, progress_bar("asking", len(asked), "questions") as step:
        for (length, question), pair in zip(asked, pool.map(marks, asked), strict=True):
            exact.setdefault((question.kind, length), []).append(pair)
            step(1)
    return Verdict({}, {cell: np.array(found) for cell, found in exact.items()})


def is_unjudged(verdict: Verdict) -> bool:
    """Whether too few answers are right at full depth to judge any kind of question."""
    return verdict.holds and len(verdict.unjudged) == len(verdict.exact)


ALIKE = "No question tells the plan from full depth. See in the server's counters or usage whether it prunes at all."


def report(verdict: Verdict) -> str:
    """A row for each kind of question, a column for each length, and a sentence.

    Raises InputError if nothing was right at full depth.
    """
    if not sum(exact[:, 1].sum() for exact in verdict.exact.values()):
        raise InputError("no answer at full depth is right; is this the tokenizer of the server's model?")
    lengths = list(dict.fromkeys(length for _, length in verdict.exact))
    cells: dict[str, list[str]] = {}
    for (kind, _), exact in verdict.exact.items():
        cells.setdefault(kind, []).append("{} / {} of {}".format(*exact.sum(0), len(exact)))
    rows = [["exact answers, plan / full depth", *(f"{length:,} tokens" for length in lengths)]]
    rows += [[kind, *row] for kind, row in cells.items()]
    sentence = "Nothing was judged." if is_unjudged(verdict) else verdict.sentence
    text = f"{table(rows)}\n\n{sentence}\nKL is not compared."
    if all((exact[:, 0] == exact[:, 1]).all() for exact in verdict.exact.values()):
        text += f"\n{ALIKE}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with the tokenizer, or a name that `pop models` lists")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (%(default)s)")
    parser.add_argument("--key", help="the server's API key (POP_API_KEY, or VLLM_API_KEY)", default=KEY)
    parser.add_argument(
        "--lengths", default="1024,4096", help="of the prompts, in tokens (%(default)s)", metavar="N,..."
    )
    parser.add_argument("--questions", type=int, default=12, help="of each kind at each length (12)", metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="decides the questions (0)", metavar="N")
    parser.add_argument("--cached", action="store_true", help="ask about texts that the server has in its cache")
    parser.add_argument("--text", action="append", default=[], help="a file to ask about, as for pop check")
    args = parser.parse_args(argv)

    def work() -> None:
        texts = [read_text(path) for path in args.text]
        lengths = integers_in("--lengths", args.lengths)
        check_count("--questions", args.questions)
        check_count("--seed", args.seed, 0)
        questions, tokenizer = questions_of(find_folder(args.model), lengths, args.questions, args.seed, texts)
        client = Client(args.url, args.key)
        client.check_lengths(lengths)
        client.check_plans()
        verdict = compare(client, questions, tokenizer, client.plan("none"), args.cached)
        print(report(verdict))
        if is_unjudged(verdict):
            raise InputError(
                "too few answers at full depth are right to judge a kind of question; give more --questions"
            )
        if is_never(client.details, "pruned_tokens"):
            raise InputError("the server has pruned no token; are the prompts long enough for its plan?")
        if args.cached and is_never(client.details, "cached_tokens"):
            raise InputError(
                "the server has taken no token from its cache, so no text was cached; does it keep caches?"
            )
        holds.append(verdict.holds)

    holds = []
    return exit_status("check_server", work) or int(not holds[0])


if __name__ == "__main__":
    sys.exit(main())
