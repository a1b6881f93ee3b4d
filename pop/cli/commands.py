"""The `pop` command: demo, generate, chat, importance, calibrate, models, download, verify, import-gguf.

Answers go to stdout, what is said about them to stderr. Exit status: 0, 2 for a mistake (told in one
sentence), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

import pop
from pop.backends.tensor_parallel import launched
from pop.calibration.refit import builtin_texts
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config
from pop.errors import ConfigError, ContextOverflow, InputError, PlanError, PopError, WeightsNotFound, check_count

PRUNE_HELP = "layers to prune: default (the deepest third), none, a fraction, or the path of a saved plan"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status. argv: without the program's name; None takes sys.argv."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # A positional argument behind an option: before Python 3.12, argparse has given up on it by then.
    behind_dashes = rest[:1] == ["--"]
    rest = rest[behind_dashes:]
    if len(rest) == 1 and getattr(args, "prompt", "") is None and (behind_dashes or not rest[0].startswith("-")):
        args.prompt = rest.pop()
    if hasattr(args, "files") and not any(word.startswith("-") for word in rest):
        args.files, rest = args.files + rest, []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows "?" for it
        sys.stdout.reconfigure(errors="replace")
    rank, ranks = launched()
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            if ranks > 1 and args.run not in (generate, calibrate):
                raise InputError("of pop's commands, torchrun can start generate and calibrate; run this one without")
            if rank > 0:  # one voice is enough
                silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            args.run(args)
            sys.stdout.flush()
        return 0
    except PopError as error:
        print(f"pop: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npop: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:  # not of the output
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):
            return 141  # as the shell reports a program whose output nobody read on
        print(f"pop: the output cannot be written ({error.strerror}); free space, or write elsewhere", file=sys.stderr)
        return 2


def demo(args) -> None:
    from pop.cli.demo import run

    text = None if args.prompt_file is None else _read_file(args.prompt_file)
    prune = parse_prune(args.prune)
    run(args.model, text, prune, max_new_tokens=args.max_new_tokens, runs=args.runs, as_json=args.json)


def generate(args) -> None:
    if (args.prompt is None) == (args.prompt_file is None):
        raise InputError("give either a prompt or --prompt-file, and just one of them")
    if args.prompt_file is not None:
        prompt = _read_file(args.prompt_file)
    else:
        if args.prompt == "-" and launched()[1] > 1:
            raise InputError("the standard input reaches one process only; give the text by --prompt-file")
        prompt = _readable(sys.stdin.read, "the standard input") if args.prompt == "-" else args.prompt
    model = _load(args)
    seen = _seen(args, model)
    for kind, mark in reversed(model.vision.marks.items()):
        if mark not in prompt:
            prompt = mark * len(seen[f"{kind}s"]) + prompt
    _print_answer(model.stream(prompt, **seen, **_generation_options(args)))


def chat(args) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing)
    model = _load(args)
    seen = first = _seen(args, model)
    conversation = model.start_chat(args.system)
    print("/new starts a new conversation, /quit ends, Ctrl-C stops an answer.", file=sys.stderr)

    def ask() -> str:
        return _readable(lambda: input("> " if sys.stdin.isatty() else ""), "the standard input").strip()

    with contextlib.suppress(EOFError):
        while (line := ask()) != "/quit":
            if line == "/new":
                conversation, seen = model.start_chat(args.system), first
            elif line and _turn(conversation, line, seen | _generation_options(args)):
                seen = {}


def _turn(conversation, line: str, options: dict) -> bool:
    """Answer one message. If there is no whole answer, the conversation goes on as if there had been no message."""
    try:
        _print_answer(conversation.stream(line, **options))
        return True
    except KeyboardInterrupt:
        print("\n(stopped, and forgotten)", flush=True)
    except ContextOverflow as error:
        print(f"pop: {error}; or start a new conversation with /new", file=sys.stderr)
    except InputError as error:
        print(f"pop: {error}", file=sys.stderr)
    return False


def importance(args) -> None:
    from pop.calibration.scores import check_plot

    texts = {path: _read_file(path) for path in args.files} or dict(enumerate(builtin_texts()))
    if args.plot is not None:
        check_plot(args.plot)
    _check_folders(args.out, args.plot)
    args.prune = "none"  # the scores are of the full model
    model = _load(args)
    model.need_tokenizer("importance")
    prompts = excerpts(model.tokenizer, texts, args.samples, args.prompt_tokens, args.seed)
    names = ("response_tokens", "batch_size", "seed", "branches", "resume")
    result = pop.importance(model, prompts, **{name: getattr(args, name) for name in names})
    print(f"layer  {'prefill':>22}  {'decode':>22}")
    columns = (result.prefill, result.prefill_error, result.decode, result.decode_error)
    for layer, row in enumerate(torch.stack(columns, 1).tolist()):
        print("{:5}  {:10.4g} ± {:9.2g}  {:10.4g} ± {:9.2g}".format(layer, *row))
    least = result.plan(len(result.prefill) // 3).layers
    print(f"\nThe third that prefill needs least: layers {', '.join(map(str, least))}.")
    if args.out is not None:
        result.save(args.out)
    if args.plot is not None:
        result.plot(args.plot)


def excerpts(tokenizer, texts: dict[str, str], count: int, length: int, seed: int) -> list[list[int]]:
    """`count` excerpts of `length` tokens, or a whole text if it is shorter, from each text in turn, at random."""
    check_count("--samples", count)
    check_count("--prompt-tokens", length)
    random = Random(seed)
    tokens = [tokenizer.encode(text, bos=False) for text in texts.values()]
    if [] in tokens:
        raise InputError(f"{list(texts)[tokens.index([])]} holds no text; give another file")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    chosen = [tokens[number % len(tokens)] for number in range(count)]
    begins = [random.randrange(max(1, len(text) - length + 1)) for text in chosen]
    return [bos + text[begin : begin + length] for text, begin in zip(chosen, begins, strict=True)]


def calibrate(args) -> None:
    texts = [_read_file(path) for path in args.files] or None
    _check_folders(args.out)
    model = _load(args)
    if not model.plan.layers:
        raise PlanError("--prune none prunes nothing, so there is nothing to calibrate; give a fraction or a plan")
    plan = model.plan
    if args.full_depth_last is not None:
        plan = dataclasses.replace(plan, full_depth_last=args.full_depth_last)
    plan = pop.calibrate(model, texts, plan, taps=args.taps, window=args.window, seed=args.seed)
    if launched()[0] == 0:
        plan.save(args.out)
    print(f"Saved to {args.out}. Try: pop generate {shlex.quote(args.model)} --prune {shlex.quote(args.out)} PROMPT")


def _check_folders(*paths: str | None) -> None:
    """Raise InputError for a file that cannot be written: better known now than after the work."""
    for path in paths:
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise InputError(f"{path} cannot be written, since its folder does not exist; make it, or choose another")


def models(args) -> None:
    rows = [("name", "family", "parameters", "weights")]
    for name in pop.list_models():
        entry = registry.lookup(name)
        try:
            where = str(registry.find_weights(name))
        except WeightsNotFound:
            where = f"not here (pop demo --model {name} fetches them)" if entry.embedded else "not here"
        rows.append((name, entry.family, f"{entry.parameters:,}", where))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, family, parameters, where in rows:
        print(f"{name:{widths[0]}}  {family:{widths[1]}}  {parameters:>{widths[2]}}  {where}")
    print(f"\nNew weights go into {registry.weights_folder()}/NAME; `pop download NAME` fetches them.")


def download(args) -> None:
    from pop.checkpoints.download import download

    folder = download(args.model)
    print(f'{args.model} is in {folder}. Try: pop generate {args.model} "Once upon a time"')


def verify(args) -> None:
    from pop.checkpoints.download import verify

    folder = args.model if os.path.isdir(args.model) else registry.find_weights(args.model)
    manifest = verify(folder)
    size = f"{len(manifest.files)} files, {sum(file.size for file in manifest.files.values()):,} bytes"
    print(f"{folder}: {size}, unchanged since their download: {manifest.repository}, commit {manifest.commit}.")


def import_gguf(args) -> None:
    from pop.checkpoints.gguf import import_gguf

    folder = import_gguf(args.file, args.folder)
    print(f"Imported into {folder}.")
    with contextlib.suppress(ConfigError):  # of a family that is converted, but not run yet
        read_config(folder)
        print(f'Try: pop generate {shlex.quote(str(folder.resolve()))} "Once upon a time"')


def parse_prune(text: str):
    """--prune's value as `pop.load` takes it: "default", None, a fraction, or the PrunePlan in a file."""
    if text in ("default", "none"):
        return None if text == "none" else text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    if not os.path.isfile(text):
        raise PlanError(
            f"--prune is {text!r}; give default, none, a fraction of the layers from 0 to 1 such as 0.5, "
            "or the path of a saved plan"
        )
    return pop.PrunePlan.load(text)


def _load(args):
    options = {"device": args.device, "dtype": args.dtype and getattr(torch, args.dtype), "quantize": args.quantize}
    return pop.load(args.model, prune=parse_prune(args.prune), parallel="auto", **options)


def _seen(args, model) -> dict:
    """The images and videos that the command line names, read. Raises InputError where the model does not see."""
    (seen,) = model.vision.prepare_batch(args.image, args.video, 1)
    return {f"{kind}s": [one for one in seen if one.kind == kind] for kind in ("image", "video")}


def _generation_options(args) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def _print_answer(stream) -> None:
    """Print the pieces as they come."""
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)


def _read_file(path: str) -> str:
    return _readable(lambda: Path(path).read_text(encoding="utf-8"), path)


def _readable(read: Callable[[], str], source: str) -> str:
    try:
        return read()
    except UnicodeDecodeError:
        raise InputError(f"{source} is not text in UTF-8; convert it, or give another file") from None
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pop", description="Language models with prefill-only pruning.")
    parser.add_argument("--version", action="version", version=f"pop {pop.__version__}")
    parser.set_defaults(run=lambda args: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(run, text: str) -> Callable:
        """Add a command; return what adds an argument to it: option("--name", "help text", ...)."""
        added = commands.add_parser(run.__name__.replace("_", "-"), help=text, description=text)
        added.set_defaults(run=run)
        return lambda *names, **settings: added.add_argument(*names[:-1], help=names[-1], **settings)

    def model_options(option) -> None:
        option("model", "a name that `pop models` lists, or a directory", metavar="NAME_OR_DIR")
        option("--dtype", "default: the checkpoint's", choices=("float32", "bfloat16", "float16"))
        option("--device", "cpu, cuda, cuda:1 ...; default: a GPU if there is one")
        option("--quantize", "int8: round the weights to 8 bits, which needs torchao", metavar="KIND")

    def generation_options(option) -> None:
        option("--max-new-tokens", "length of the answer (256)", type=int, default=256, metavar="N")
        option("--temperature", "0, the default, is greedy", type=float, default=0.0, metavar="T")
        option("--top-k", "sample among the K likeliest tokens", type=int, metavar="K")
        option("--top-p", "sample among the likeliest tokens of this probability", type=float, metavar="P")
        option("--seed", "the same seed samples the same text", type=int, metavar="N")
        option("--stop", "end before this text; may be repeated", action="append", metavar="TEXT")
        option("--prune", PRUNE_HELP, default="default", metavar="P")

    def seen_options(option, where: str) -> None:
        for kind in ("image", "video"):
            option(f"--{kind}", f"show this {kind}, {where}; may be repeated", action="append", metavar="FILE")

    option = command(demo, "Compare full and pruned prefill on a real model (fetched the first time).")
    option("--model", "default: smollm2-135m", default="smollm2-135m", metavar="NAME_OR_DIR")
    option("--prompt-file", "ask this text instead of the built-in story and question", metavar="F")
    option("--prune", PRUNE_HELP, default="default", metavar="P")
    option("--max-new-tokens", "length of the answers (48)", type=int, default=48, metavar="N")
    option("--runs", "timed prefills of each kind (3)", type=int, default=3, metavar="N")
    option("--json", "print one JSON object instead of the table", action="store_true")

    option = command(generate, "Continue a text; the continuation is printed as it comes.")
    model_options(option)
    generation_options(option)
    seen_options(option, "where the text has the family's mark, or before it")
    option("prompt", "the text, or - for the standard input", nargs="?", metavar="PROMPT")
    option("--prompt-file", "read the text from this file", metavar="F")

    option = command(chat, "Talk to an instruct model.")
    model_options(option)
    generation_options(option)
    seen_options(option, "before the first message")
    option("--system", "the system message", metavar="TEXT")

    option = command(importance, "Measure how much prefill and decode need each layer, by virtual gates.")
    model_options(option)
    option("files", "texts to cut prompts from; default: a built-in set", nargs="*", metavar="FILE")
    option("--samples", "prompts (200)", type=int, default=200, metavar="N")
    option("--prompt-tokens", "length of the prompts (256)", type=int, default=256, metavar="N")
    option("--response-tokens", "length of the responses that it samples (64)", type=int, default=64, metavar="N")
    option("--batch-size", "samples in memory together (8)", type=int, default=8, metavar="N")
    option("--seed", "the same seed gives the same scores (0)", type=int, default=0, metavar="N")
    option("--branches", "score attention and MLP apart as well, for --out", action="store_true")
    option("--resume", "keep unfinished work in this file, and go on from there", metavar="FILE")
    option("--out", "write the scores to this JSON file", metavar="FILE")
    option("--plot", "draw them as this .svg or .png file (needs matplotlib)", metavar="FILE")

    option = command(calibrate, "Refit the pruned layers' K and V projections to texts, and save the plan.")
    model_options(option)
    option("files", "texts like what will be prompted with; default: a built-in set", nargs="*", metavar="FILE")
    option("--out", "write the plan to this file", required=True, metavar="FILE")
    option("--prune", PRUNE_HELP, default="default", metavar="P")
    option("--full-depth-last", "last tokens of a prompt that run all layers (the plan's, 1)", type=int, metavar="N")
    option("--taps", "2, the default, or 1: without the second input", type=int, default=2, metavar="N")
    option("--window", "tokens of text that are read together (1024)", type=int, default=1024, metavar="N")
    option("--seed", "which windows are held out (0)", type=int, default=0, metavar="N")

    command(models, "List the known models and where their weights are.")

    option = command(download, "Fetch the files of a model from the Hugging Face Hub; HF_TOKEN opens gated ones.")
    option("model", "a name that `pop models` lists", metavar="NAME")

    option = command(verify, "Compare the files of a model with the hashes kept when they were downloaded.")
    option("model", "a name that `pop models` lists, or a directory", metavar="NAME_OR_DIR")

    option = command(import_gguf, "Convert a GGUF file into a checkpoint directory.")
    option("file", "the GGUF file", metavar="FILE", type=Path)
    option("folder", "the directory to make", metavar="DIR", type=Path)
    return parser
