"""Start vLLM with a plan, send it prompts that the plan prunes, and start it without the plan if that fails.

    python -m pop_vllm.start my.plan vllm serve FOLDER --gpu-memory-utilization 0.89

The server starts without the plan if it ends, is not healthy in time, refuses a prompt, or has pruned nothing. It also
does if it ends later, whatever its status is, since vLLM's is 0 after its engine has died. To stop it, stop this
program. The file of --ready exists while the server runs and its plan has passed the test, or there is none. vLLM's own
/health is good before the test. The exit status is that of vLLM without the plan, and 0 after a signal.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

SHORT = 1024  # tokens of a prompt that runs in one step
LONG = 20_000  # and of one that vLLM divides, if its context has room
SECONDS = 240  # that an answer may take: the first pruned step compiles
HEALTH = 5  # seconds that /health may take, before it is asked again
POLL = 1.0  # seconds
STOP = 60  # seconds that vLLM may take to stop
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Failed(Exception):
    """The server has not passed its test."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pop_vllm.start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="where the server will be (on this machine, at the port of its command)")
    parser.add_argument("--key", default=os.environ.get("VLLM_API_KEY"), help="its API key (VLLM_API_KEY)")
    parser.add_argument("--ready", type=Path, help="a file that exists while the server runs", metavar="FILE")
    parser.add_argument(
        "--limit", type=float, default=1800, help="for a start with the plan, in seconds (%(default)s)", metavar="S"
    )
    parser.add_argument("plan", help="a saved plan, or another value of POP_PLAN")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="vllm serve, and its options")
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("the command that starts vLLM is missing")
    if args.url is None:
        ports = re.findall(r" --port[ =](\d+)", " ".join(args.command))
        args.url = f"http://127.0.0.1:{ports[-1] if ports else 8000}"  # vLLM takes the last one
    args.url = args.url.removesuffix("/").removesuffix("/v1")
    if shutil.which(args.command[0]) is None:
        parser.error(f"there is no program {args.command[0]}")
    if is_answered(args.url):
        parser.error(f"a server answers at {args.url} already; stop it, or give another port")
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, end)
    with tempfile.TemporaryDirectory() as counters:
        serve(args, {"POP_PLAN": args.plan, "PROMETHEUS_MULTIPROC_DIR": counters})
    say("starting vLLM without the plan")
    return serve(args, {})


def is_answered(url: str) -> bool:
    """Whether a server is there."""
    try:
        open_url(f"{url}/health", timeout=HEALTH).close()
    except HTTPError:
        return True
    except (OSError, HTTPException):
        return False
    return True


def end(*_) -> None:
    """End the program at a signal, and with it the server. Another signal does not disturb that."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit()


def serve(args: argparse.Namespace, settings: dict[str, str]) -> int:
    """Run the server until it ends, or has not passed the test of its plan, and return its exit status."""
    if args.ready:
        args.ready.unlink(missing_ok=True)  # of a program that was killed
    inherited = {name: value for name, value in os.environ.items() if name != "POP_PLAN"}
    say(f"waiting for {args.url}")
    process = subprocess.Popen(args.command, env=inherited | settings, start_new_session=True)
    try:
        wait_until_healthy(process, args.url, args.limit if settings else math.inf)
        if settings:
            pruned, tokens = tried(args.url, args.key)
            say(f"{args.plan} runs: {pruned:,} of {tokens:,} prompt tokens were pruned")
        if args.ready:
            args.ready.touch()
        process.wait()
        say(f"vLLM has ended with status {process.returncode}")
    except Failed as error:
        say(str(error))
    finally:
        try:
            if args.ready:
                args.ready.unlink(missing_ok=True)
        finally:
            stop(process)
    return process.returncode


def wait_until_healthy(process: subprocess.Popen, url: str, limit: float) -> None:
    """Raise Failed if the server ends before it is healthy, or is not healthy after `limit` seconds."""
    since = time.monotonic()
    while process.poll() is None:
        if time.monotonic() - since > limit:
            raise Failed(f"vLLM is not healthy after {limit:g} s")
        try:
            open_url(f"{url}/health", timeout=HEALTH).close()
            return
        except (OSError, HTTPException):
            time.sleep(POLL)
    raise Failed(f"vLLM has ended with status {process.returncode} before it was healthy")


def tried(url: str, key: str | None) -> tuple[int, int]:
    """Send two prompts, and return how many of their tokens were pruned, and how many they have. Raises Failed."""
    try:
        model = json.loads(asked(f"{url}/v1/models", key))["data"][0]  # one for each name that it is served by
        room = model["max_model_len"] - 2  # a new token, and one that vLLM may add
        room = min(room, int(os.environ.get("POP_LONGEST") or room))  # longer prompts are not pruned
        lengths = sorted({min(SHORT, room), min(LONG, room)})
        for length in lengths:
            prompt = [(7 * position + length) % 200 for position in range(length)]  # ids that all vocabularies have
            asked(f"{url}/v1/completions", key, {"model": model["id"], "prompt": prompt, "max_tokens": 1})
        lines = asked(f"{url}/metrics", key).splitlines()
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise Failed(f"a prompt for the plan has failed: {error!r}") from None
    pruned = sum(float(line.split()[-1]) for line in lines if line.startswith("pop:pruned_tokens_total"))
    if not pruned:
        raise Failed(f"no token was pruned in prompts of {lengths} tokens; is the plugin in vLLM's environment?")
    return round(pruned), sum(lengths)


def asked(url: str, key: str | None, fields: dict | None = None) -> str:
    """The text of an answer. Raises OSError for one with an error."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps(fields).encode() if fields else None
    with open_url(urllib.request.Request(url, body, headers), timeout=SECONDS) as response:
        return response.read().decode()


def stop(process: subprocess.Popen) -> None:
    """End the server, and the processes that it has started."""
    try:
        process.terminate()
        process.wait(STOP)
    except subprocess.TimeoutExpired:
        say(f"vLLM has not stopped in {STOP} s, and is killed")
    finally:  # also after a signal
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)  # the group has the process's id
        process.wait()


def say(line: str) -> None:
    print(f"pop: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
