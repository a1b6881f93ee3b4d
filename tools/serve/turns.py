"""Time to first token in each turn of a conversation, on servers of the OpenAI protocol.

    python -m tools.serve.turns http://127.0.0.1:8000/v1 http://127.0.0.1:8001/v1

The servers may be of any make. All get the same messages of the user. Each conversation continues with its server's
answers, which that server may have in a cache. The servers take turns, so a change of the machine's load meets all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from statistics import median
from typing import NamedTuple

from pop.errors import InputError, check_count
from tools.common import Countdown, check_writable, exit_status, table, write_figures
from tools.serve.kept_logits import assistant, conversation, user

KEY = "OPENAI_API_KEY"  # the environment variable with the key that all servers get
TIMEOUT = 600  # seconds without a byte


class Server(NamedTuple):
    url: str
    model: str


def connect(address: str) -> Server:
    """The server at URL or URL#MODEL. Without a model, it is the first that the server lists."""
    url, _, model = address.partition("#")
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{address} is no address; write one as in http://127.0.0.1:8000/v1")
    if model:
        return Server(url, model)
    listed = b"".join(request(f"{url}/models"))
    try:
        return Server(url, json.loads(listed)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{url}/models names no model; write {url}#MODEL") from None


def request(url: str, body: dict | None = None) -> Iterator[bytes]:
    """The lines of an answer as they come. Raises InputError if the server does not answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY, 'none')}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT) as answer:
            yield from answer
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} answers {error.code}: {error.read(300).decode(errors='replace')}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url} cannot be reached ({error}); start the server first") from None


def ask(server: Server, messages: list[dict], new_tokens: int) -> tuple[float, str]:
    """Seconds to the first text of a greedy answer, and the whole answer."""
    body = {"model": server.model, "messages": messages, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    first = None
    text = ""
    begin = time.perf_counter()
    for line in request(f"{server.url}/chat/completions", body):
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        piece = piece_of(server, data)
        if piece and first is None:
            first = time.perf_counter() - begin
        text += piece
    if first is None:
        raise InputError(f"{server.url} has answered without a text; ask for more --new-tokens")
    return first, text


def piece_of(server: Server, data: bytes) -> str:
    """The text in an event of a stream, or "" if the event has no text."""
    try:
        event = json.loads(data)
        choices = event.get("choices", [])
        if "error" not in event:
            return choices[0]["delta"].get("content") or "" if choices else ""
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise InputError(f"{server.url} sends {data[:300].decode(errors='replace')}, which is no part of an answer")


def run(args: argparse.Namespace) -> list[list[float]]:
    """Seconds to the first token, by turn and server, [turns][servers]."""
    check_count("--turns", args.turns)
    check_count("--new-tokens", args.new_tokens)
    check_writable(args.json)
    texts = conversation(args.turns)
    servers = [connect(address) for address in args.servers]
    for server in servers:  # the first answer may compile or load
        ask(server, [user("Hello")], args.new_tokens)
    histories = [[] for _ in servers]
    times = []
    step = Countdown("turn", args.turns)
    for number, text in enumerate(texts):
        step()
        row = [0.0] * len(servers)
        for turn in range(len(servers)):
            index = (number + turn) % len(servers)  # another one begins each time
            messages = histories[index]
            messages.append(user(text))
            row[index], answer = ask(servers[index], messages, args.new_tokens)
            messages.append(assistant(answer))
        times.append(row)
    if args.json:
        write_figures(args.json, {"servers": [server._asdict() for server in servers], "ttft_s": times})
    return times


def report(addresses: list[str], times: list[list[float]]) -> str:
    """A table of milliseconds, with a line for each turn, and the median."""
    rows = [["turn", *addresses]]
    for number, row in enumerate(times, start=1):
        rows.append([f"{number}", *(f"{1e3 * seconds:,.0f}" for seconds in row)])
    columns = zip(*times, strict=True)
    rows.append(["median", *(f"{1e3 * median(column):,.0f}" for column in columns)])
    return f"{table(rows)}\n\nMilliseconds from a request to the first text of its answer."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.serve.turns", description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("servers", nargs="+", help="an address, as in http://127.0.0.1:8000/v1; add #MODEL to choose a model")
    option("--turns", type=int, default=10, help="messages of the user, of some 400 tokens each (10)", metavar="N")
    option("--new-tokens", type=int, default=32, help="the most tokens of an answer (32)", metavar="N")
    option("--json", help="also write the figures to this file", metavar="FILE")
    args = parser.parse_args(argv)
    return exit_status("turns", lambda: print(report(args.servers, run(args))))


if __name__ == "__main__":
    sys.exit(main())
