"""What a plan changes in the answers to your own requests, where they are served.

    python -m tools.check_chats log.jsonl --out answers.jsonl       # of tools.serve, or of vLLM with POP_PLAN

A line of log.jsonl is a request: {"messages": [...]}. Of its other keys, these are sent: "tools", "tool_choice",
"response_format" and "chat_template_kwargs". An answer at its end is not.

Each request is sent three times at temperature 0: with the server's plan, at full depth, and at full depth again. The
last two may differ as well, since requests share steps, and the third may find its prompt in the server's cache. So
compare the first row of the table with the second one.

Unequal answers may be equally good. answers.jsonl has all three, for a judge of your own. A request that the server
refuses has an "error" there. The exit status is 2 if no answer was compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from pop.cli.texts import conversation, read_lines
from pop.errors import InputError, check_count
from pop.system import files
from pop.system.progress import progress_bar
from tools.check_server import AT_ONCE, KEY, Client, is_never
from tools.common import exit_status, table

WAYS = ("plan", "full depth", "full depth again")
SENT = ("tools", "tool_choice", "response_format", "chat_template_kwargs")  # beside the messages


def questions_in(path: str) -> list[dict]:
    """The requests of a file, each with "messages" up to the question, and with those of SENT that it has."""
    if not path.endswith(".jsonl"):
        raise InputError(f"{path} must end in .jsonl, and hold a request in each line")
    requests = []
    for where, line in read_lines(path):
        messages = conversation(line, where)["messages"]
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise InputError(f"{where} holds no question")
        sent = {key: value for key, value in json.loads(line).items() if key in SENT and value}
        requests.append({"messages": messages} | sent)
    return requests


def ask(client: Client, requests: list[dict], full_depth: dict, most: int) -> list[dict[str, str]]:
    """Answers of at most `most` tokens to each request, by WAYS. One that the server refuses has an "error" instead."""

    def answers(request: dict) -> dict[str, str]:
        ways = zip(WAYS, ({}, full_depth, full_depth), strict=True)
        try:
            return {way: client.chat(request | {"max_tokens": most} | options) for way, options in ways}
        except InputError as error:
            return {"error": str(error)}

    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool, progress_bar("asking", len(requests), "requests") as step:
        for one in pool.map(answers, requests):
            found.append(one)
            step(1)
    return found


def report(answers: list[dict[str, str]]) -> str:
    """A row for the plan, and one for what differs without it. Raises InputError if there is no text to compare."""
    refused = [one["error"] for one in answers if "error" in one]
    answers = [one for one in answers if "error" not in one]
    if not any("".join(one.values()) for one in answers):
        raise InputError("no answer has text" + (f"; the server says: {refused[0]}" if refused else ""))
    rows = [["compared with full depth", "equal answers", "their first characters that are equal"]]
    for way in ("plan", "full depth again"):
        pairs = [(one[way], one["full depth"]) for one in answers]
        equal = sum(a == b for a, b in pairs)
        same = sum(common_beginning(*pair) for pair in pairs)
        longest = max(1, sum(max(map(len, pair)) for pair in pairs))
        rows.append([way, f"{equal} of {len(pairs)}", f"{same / longest:.0%}"])
    lines = [table(rows)]
    if refused:
        lines.append(f"Requests that were refused: {len(refused)}. The first: {refused[0]}")
    return "\n\n".join(lines)


def common_beginning(a: str, b: str) -> int:
    """How many characters two texts have in common before they differ."""
    differs = (index for index, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    return next(differs, min(len(a), len(b)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.check_chats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("requests", help="a .jsonl file", metavar="FILE")
    parser.add_argument("--out", help="write the answers to this file, a line for each request", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (%(default)s)")
    parser.add_argument("--key", help="the server's API key (POP_API_KEY, or VLLM_API_KEY)", default=KEY)
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (256)", metavar="N")
    args = parser.parse_args(argv)

    def work() -> None:
        requests = questions_in(args.requests)
        check_count("--max-tokens", args.max_tokens)
        files.check_writable(args.out, "the answers", InputError)
        client = Client(args.url, args.key)
        client.check_plans()
        answers = ask(client, requests, client.plan("none"), args.max_tokens)
        lines = [json.dumps(request | one) for request, one in zip(requests, answers, strict=True)]
        files.write_whole(args.out, "".join(f"{line}\n" for line in lines).encode(), "the answers", InputError)
        print(report(answers), f"The answers are in {args.out}.", sep="\n\n")
        if is_never(client.details, "pruned_tokens"):
            raise InputError("the server has pruned no token; are the prompts long enough for its plan?")

    return exit_status("check_chats", work)


if __name__ == "__main__":
    sys.exit(main())
