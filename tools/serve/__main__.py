"""Serve a model to clients of the OpenAI protocol.

python -m tools.serve smollm2-135m --port 8000
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading

import pop
from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import find_folder
from pop.errors import InputError, check_count
from pop.models.config import DTYPES
from pop.system.memory import free_bytes
from tools.common import exit_status
from tools.serve.engine import Engine
from tools.serve.requests import MAX_ANSWERS

try:
    import uvicorn

    from tools.serve.app import LOCAL, Server
except ImportError:
    raise SystemExit(
        "tools.serve needs starlette and uvicorn; run `pip install starlette uvicorn llguidance`"
    ) from None

KEY = "POP_API_KEY"  # the environment variable with the key that clients must send
MOST_CONNECTIONS = 256


def work(engine: Engine) -> None:
    """Run the engine. Without it the server is of no use, so it ends with it."""
    try:
        engine.run()
    except Exception as error:
        print(f"tools.serve ends, because {engine.model.device} cannot be used: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Load the model, and answer requests at a bound socket until the process is stopped."""
    for option, least in (("batch", 1), ("queue", MAX_ANSWERS)):
        check_count(f"--{option}", getattr(args, option), least)
    if args.cache_mb is not None:
        check_count("--cache-mb", args.cache_mb, 0)
    if args.longest is not None:
        check_count("--longest", args.longest, 1)
    loading = ("max_seq_len", "device", "compile", "chat_format")
    default, *others = args.prune or ["default"]
    if "default" in others:
        raise InputError("give --prune default first, since default is what requests without a plan take")
    config = read_config(find_folder(args.model))
    plans = plans_for_requests([value for value in others if value != "none"], config.num_layers)
    model = pop.load(
        args.model, prune=default, dtype=DTYPES.get(args.dtype), **{name: getattr(args, name) for name in loading}
    )
    model.need_tokenizer("the server")
    for plan in plans.values():
        model.resolve(plan)  # refuses one of another model
    model.warmup(min(args.batch, 2), [*plans.values()])
    own_name = name_of(model.plan, default)
    taken = {"none": pop.PrunePlan.none(), **plans}
    if own_name in taken and not are_equal(taken[own_name], model.plan):
        raise clash(default, own_name)
    plans.setdefault(own_name, None)  # the default by its own name
    free = free_bytes(model.device) or 2**32
    engine = Engine(model, args.batch, args.queue, free // 4 if args.cache_mb is None else args.cache_mb * 2**20)
    threading.Thread(target=work, args=(engine,), daemon=True).start()
    name = os.path.basename(args.model.rstrip("/"))
    key = os.environ.get(KEY) or None
    is_local = LOCAL.fullmatch(args.host) is not None
    if key is None and not is_local:
        print(f"anybody who reaches {args.host} can use this server; set {KEY} to ask for a key", file=sys.stderr)
    app = Server(engine, name, key, is_local, plans, longest=args.longest).app
    options = {"log_level": "warning", "ws": "none", "lifespan": "off", "server_header": False}
    options |= {"limit_concurrency": MOST_CONNECTIONS, "timeout_graceful_shutdown": 5}
    config = uvicorn.Config(app, **options)
    try:
        listener.listen()  # from now on clients may connect
    except OSError as error:  # another server has taken the port while this one was loading
        raise unavailable(args.host, args.port, error) from None
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{name} is served at http://{host}:{listener.getsockname()[1]}/v1", flush=True)
    if default != "default":  # otherwise `load` has said it
        print(f"requests that name no plan take the model's: {model!r}", file=sys.stderr)
    uvicorn.Server(config).run([listener])


def plans_for_requests(values: list[str], num_layers: int) -> dict[str, pop.PrunePlan]:
    """The plans that values of --prune stand for, by the names that requests give."""
    plans = {}
    for value in values:
        plan = pop.PrunePlan.of(value, num_layers)
        name = name_of(plan, value)
        if name in plans or name in ("default", "none"):
            raise clash(value, name)
        plans[name] = plan
    return plans


def are_equal(one: pop.PrunePlan, other: pop.PrunePlan) -> bool:
    """Whether two plans prune alike. Corrections are not compared, because their record tells how they were made."""
    return one.fields() == other.fields() and one.about == other.about


def clash(value: str, name: str) -> InputError:
    """The error for a value of --prune whose name in requests is taken."""
    return InputError(f"--prune {value}: requests call it {name!r}, and so another plan; rename the file")


def name_of(plan: pop.PrunePlan, value: str) -> str:
    """What requests call a plan: a file's name without its folder and .plan, or else the value of --prune."""
    return plan.name.removesuffix(".plan") or value


def bound(host: str, port: int) -> socket.socket:
    """A socket of an address, to which nobody can connect yet. Raises InputError if the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise unavailable(host, port, error) from None
    return listener


def unavailable(host: str, port: int, error: Exception) -> InputError:
    advice = "give another --host or --port; --port 0 takes any free one"
    return InputError(f"{host} port {port} cannot be served at ({error}); {advice}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.serve", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name that `pop models` lists, or a folder")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    plans = "as in pop.load: default, none, a share, a plan's path or name; repeat it to offer several to requests, "
    plans += "which call a file by its name; the first one is the default"
    parser.add_argument("--prune", action="append", help=plans)
    parser.add_argument("--longest", type=int, help="prompts of more tokens run at full depth", metavar="TOKENS")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the checkpoint's")
    parser.add_argument("--chat-format", help="llama-3.1, chatml, gemma, or a template; default: the checkpoint's")
    parser.add_argument("--max-seq-len", type=int, help="the most tokens of a prompt and its answer")
    parser.add_argument("--batch", type=int, default=8, help="the most answers at a time")
    parser.add_argument("--queue", type=int, default=32, help="the most answers that wait; further ones are refused")
    parser.add_argument("--cache-mb", type=int, help="for kept caches (default: a quarter of the free memory)")
    parser.add_argument("--device", help="as in pop.load")
    parser.add_argument("--no-compile", dest="compile", action="store_const", const=False, default="auto")
    args = parser.parse_args(argv)

    def run() -> None:
        with bound(args.host, args.port) as listener:  # first: without an address, loading would be in vain
            serve(args, listener)

    try:
        return exit_status("tools.serve", run)
    except KeyboardInterrupt:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # the shell's status after Ctrl-C. Nothing waits for the engine's thread, which may be in torch


if __name__ == "__main__":
    sys.exit(main())
