"""The `pop` command: generate, chat, importance, calibrate, check, plans, models, download.

Answers go to stdout, notes and errors to stderr (terminal.py).
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch

import pop
from pop.backends.tensor_parallel import launched
from pop.calibration.texts import SHORTEST, builtin_texts
from pop.calibration.verdict import LENGTHS
from pop.checkpoints import download as downloads
from pop.checkpoints import registry
from pop.cli.plans import plans
from pop.cli.terminal import exit_status
from pop.cli.texts import calibration_texts, read_file, readable
from pop.errors import ContextOverflow, InputError, PopError, WeightsNotFound, check_count
from pop.generation.sampling import OPTIONS, SamplingParams
from pop.inputs.processors import Prepared
from pop.models.config import DTYPES
from pop.system import files

# Options of the command line are handed on to the arguments that have their names.
LOADING = inspect.signature(pop.load).parameters
SAMPLING = [*OPTIONS, "sampling"]
HELP = "/new starts a new conversation, /quit ends, // begins a message with a slash, Ctrl-C stops an answer."


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status. argv: without the program's name; None takes sys.argv."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    rank, ranks = launched()

    def run() -> int | None:
        if ranks > 1 and args.run not in (generate, calibrate):
            raise InputError("torchrun can start pop generate and pop calibrate only; run this command without it")
        if ranks > 1 and getattr(args, "prompt", None) == "-":
            raise InputError("only one process can read the standard input; use --prompt-file")
        if rank == 0:
            return args.run(args)
        with open(os.devnull, "w", encoding="utf-8") as silence, contextlib.redirect_stdout(silence):
            return args.run(args)

    return exit_status("pop", run)


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Those without a name may also follow options, which a subparser by itself does not take."""
    parser, commands = _parser()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


# ---- The commands ----


def generate(args) -> None:
    if (args.prompt is None) == (args.prompt_file is None):
        raise InputError("give either a prompt or --prompt-file, but not both")
    prompt = _prompt(args) if args.prompt_file is None else read_file(args.prompt_file)
    sampling = _sampling(args)
    model = _load(args)
    media = _media(args, model)
    shown = {kind: [one for one in media if one.kind == kind] for kind in ("image", "video")}
    for kind, mark in reversed(model.vision.marks.items()):
        if mark not in prompt:
            prompt = mark * len(shown[kind]) + prompt
    _print_answer(model.stream(prompt, images=shown["image"], videos=shown["video"], **sampling))


def chat(args) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing)
    prompt = _prompt(args)
    sampling = _sampling(args)
    model = _load(args)
    first_parts = [{"type": one.kind, one.kind: one} for one in _media(args, model)]
    start = functools.partial(model.start_chat, args.system, enable_thinking=args.enable_thinking)
    conversation = start()
    parts = first_parts
    if prompt is not None:
        _print_answer(conversation.stream(_message(parts, prompt), **sampling))
        return
    for line in _typed_lines():
        if line == "/new":
            conversation = start()
            parts = first_parts
        elif line.startswith("/") and not line.startswith("//"):  # /help, or an unknown command
            print(HELP, file=sys.stderr)
        else:
            message = line.removeprefix("/")
            try:
                _print_answer(conversation.stream(_message(parts, message), **sampling))
                parts = []  # the first message has shown the images and videos
            except KeyboardInterrupt:
                print("\n(stopped, and forgotten)", flush=True)
            except ContextOverflow as error:
                print(f"pop: {error}; or start a new conversation with /new", file=sys.stderr)
            except InputError as error:
                print(f"pop: {error}", file=sys.stderr)


def _message(parts: list[dict], text: str) -> str | list[dict]:
    """A message with images and videos before its text."""
    return [*parts, {"type": "text", "text": text}] if parts else text


def _typed_lines() -> Iterator[str]:
    """Yield the lines of the standard input that are not blank, until it ends or one is /quit."""
    sign = "> " if sys.stdin.isatty() else ""
    if sign:
        print(HELP, file=sys.stderr)
    with contextlib.suppress(EOFError):
        while (line := readable(lambda: input(sign), "the standard input").strip()) != "/quit":
            if line:
                yield line


def importance(args) -> None:
    texts = [read_file(path) for path in args.files] or builtin_texts()
    if args.out is not None:
        files.check_writable(args.out, "the importance scores", InputError)
    args.prune = "none"  # the full model is scored
    model = _load(args)
    model.need_tokenizer("importance")
    prompts = excerpts(model.tokenizer, texts, args.samples, args.prompt_tokens, args.seed)
    result = pop.importance(
        model,
        prompts,
        response_tokens=args.response_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    print(f"layer  {'prefill':>22}  {'decode':>22}")
    columns = (result.prefill, result.prefill_error, result.decode, result.decode_error)
    for layer, row in enumerate(torch.stack(columns, 1).tolist()):
        print("{:5}  {:10.4g} ± {:9.2g}  {:10.4g} ± {:9.2g}".format(layer, *row))
    least = result.plan(len(result.prefill) // 3).layers
    print(f"\nPrefill needs this third of the layers least: layers {', '.join(map(str, least))}.")
    if args.out is not None:
        _save(result, args.out)


def excerpts(tokenizer, texts: list[str], count: int, length: int, seed: int) -> list[list[int]]:
    """Cut `count` random excerpts of `length` tokens from the texts in turn. Return their ids after BOS."""
    check_count("--samples", count)
    check_count("--prompt-tokens", length)
    random = Random(seed)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = [tokenizer.encode(text, bos=False) for text in texts]
    prompts = []
    for ids in itertools.islice(itertools.cycle(tokens), count):
        begin = random.randrange(max(1, len(ids) - length + 1))
        prompts.append(bos + ids[begin : begin + length])
    return prompts


def calibrate(args) -> None:
    texts = [read_file(path) for path in args.files]
    if args.out is None:
        args.out = registry.find_folder(args.model) / "default.plan"
    files.check_writable(args.out, "the plan", InputError)
    resume = f"{args.out}.progress" if args.steps else None
    lengths = _lengths(args.longest)
    args.prune = "none"
    model = _load(args)
    fitted, rest = calibration_texts(model, args.files, texts)
    options = {name: getattr(args, name) for name in ("layers", "speedup", "rank", "longest", "steps", "seed")}
    plan = pop.calibrate(model, fitted, resume=resume, **options)
    verdict = pop.check(model, plan, rest, lengths=lengths)
    plan = dataclasses.replace(plan, about=plan.about | {"verdict": verdict.record()})
    if launched()[0] == 0:
        _save(plan, args.out)
        if resume is not None:
            Path(resume).expanduser().unlink(missing_ok=True)
    print(verdict)
    print(f"Saved to {args.out}. Try: pop generate {args.model} --prune {args.out} PROMPT")


def check(args) -> int:
    """Print the verdict on a plan. Return 0 if it holds, and 1 if not."""
    texts = [read_file(path) for path in args.files] or None
    lengths = _lengths(args.longest)
    questions = check_count("--questions", args.questions)
    model = _load(args)
    verdict = pop.check(model, model.plan, texts, lengths=lengths, questions=questions)
    print(verdict)
    return int(not verdict.holds)


def _lengths(longest: int) -> list[int]:
    """The prompt lengths of a verdict, up to the longest."""
    check_count("--longest", longest, SHORTEST)
    return [*(length for length in LENGTHS if length < longest), longest]


def _save(result, path: str) -> None:
    """Save what a command has computed. If that fails, save it into a temporary file, and name that."""
    try:
        result.save(path)
    except PopError as error:
        spare = Path(tempfile.mkdtemp(prefix="pop-")) / "saved"
        result.save(spare)
        raise type(error)(f"{error}; it is in {spare}") from None


def models(args) -> None:
    line = "{:28}  {:8}  {:>16}  {}"
    print(line.format("name", "family", "parameters", "weights"))
    for entry in registry.MODELS.values():
        try:
            where = registry.find_weights(entry.name)
        except WeightsNotFound:
            where = "not here"
        except PopError as error:
            where = error
        print(line.format(entry.name, entry.family, f"{entry.parameters:,}", where))
    print(f"\nNew weights go into {registry.weights_folder()}/NAME; `pop download NAME` fetches them.")


def download(args) -> None:
    folder = downloads.download(args.model, args.revision)
    print(f'{args.model} is in {folder}. Try: pop generate {args.model} "Once upon a time"')


# ---- What the commands share ----


def _load(args):
    options = {name: value for name, value in vars(args).items() if name in LOADING}
    options["dtype"] = DTYPES.get(args.dtype)
    model = pop.load(args.model, parallel="auto", **options)
    changes = {}
    for name in ("full_depth_last", "full_depth_selected", "selecting_layer"):
        value = getattr(args, name, None)
        if value is not None:
            changes[name] = value
    model.plan = dataclasses.replace(model.plan, **changes)
    return model


def _media(args, model) -> list[Prepared]:
    """Return the images and videos that the command line names."""
    (media,) = model.vision.prepare_batch(args.image, args.video, 1)
    return media


def _sampling(args) -> dict:
    """Return the options of sampling that are given. Raises InputError for a wrong one, before the model is loaded."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name, None) is not None}
    SamplingParams(**{name: value for name, value in given.items() if name != "sampling"})
    return given


def _print_answer(stream) -> None:
    """Print an answer as it comes."""
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)


def _prompt(args) -> str | None:
    return readable(sys.stdin.read, "the standard input") if args.prompt == "-" else args.prompt


# ---- The options ----


def integer(add, name: str, text: str, default: int | None = None) -> None:
    shown = text if default is None else f"{text} ({default})"
    add(name, help=shown, type=int, default=default, metavar="N")


def model_options(add) -> None:
    add("model", help="a name in `pop models`, OWNER/REPOSITORY, or a directory", metavar="NAME_OR_DIR")
    add("--dtype", help="default: the checkpoint's", choices=tuple(DTYPES))
    add("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one")
    add("--no-compile", help="run eagerly", dest="compile", action="store_const", const=False, default="auto")


def prune_options(add) -> None:
    text = "the layers prefill skips: default (the best plan known for the weights, or the deepest third), none, a"
    text += " fraction, layers such as 10,12,19-29, a saved plan's path or name, or the file of `pop importance`"
    add("--prune", help=text, default="default")
    integer(add, "--full-depth-last", "how many last tokens of a prompt run all layers; default: the plan's")
    text = "the share of the other tokens to select, which skip fewer layers or none; default: the plan's"
    add("--full-depth-selected", help=text, type=float)
    integer(add, "--selecting-layer", "the layer whose attention selects them; default: the plan's")


def generation_options(parser, media_place: str) -> Callable:
    """Add what `generate` and `chat` share. Return the function that adds more options about the prompt."""
    model_options(parser.add_argument_group("model").add_argument)
    prune_options(parser.add_argument_group("pruning").add_argument)
    add = parser.add_argument_group("answer").add_argument
    integer(add, "--max-new-tokens", "the most tokens of an answer", 256)
    add("--temperature", help="0, the default, is greedy decoding", type=float)
    add("--top-k", help="sample from this many of the likeliest tokens", type=int)
    add("--top-p", help="sample from the likeliest tokens whose probabilities sum to this", type=float)
    add("--min-p", help="sample from tokens of at least this many times the best probability", type=float)
    add("--repetition-penalty", help="above 1: tokens that occurred are less likely", type=float)
    add("--sampling", help="take what is not given from generation_config.json", choices=("checkpoint",))
    integer(add, "--seed", "the same seed gives the same text")
    add("--stop", help="end the answer before this text; may be repeated", action="append")
    add = parser.add_argument_group("prompt").add_argument
    for kind in ("image", "video"):
        add(f"--{kind}", help=f"show this {kind} {media_place}; may be repeated", action="append", metavar="FILE")
    integer(add, "--min-pixels", "enlarge images to this many pixels; default: the checkpoint's limit")
    integer(add, "--max-pixels", "shrink images to this many pixels; default: the checkpoint's limit")
    integer(add, "--max-seq-len", "the most tokens of prompt and answer together; default: the full context")
    return add


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and that of each command."""
    parser = argparse.ArgumentParser(prog="pop", description="Language models with prefill-only pruning.")
    parser.add_argument("--version", action="version", version=f"pop {pop.__version__}")
    parser.set_defaults(run=lambda args: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(run, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=text, description=text)
        added.set_defaults(run=run)
        return added

    added = command(generate, "Continue a text, and print the continuation as it comes.")
    add = generation_options(added, "at the family's mark in the text, or before the text")
    add("prompt", help="the text, or - for the standard input", nargs="?", metavar="PROMPT")
    add("--prompt-file", help="read the text from this file")

    added = command(chat, "Talk to an instruct model. Without a MESSAGE, each line of the standard input is one.")
    add = generation_options(added, "before the first message")
    add("prompt", help="answer this and end; - reads the whole standard input", nargs="?", metavar="MESSAGE")
    add("--system", help="the system message")
    add("--no-thinking", help="ask a model to answer at once", dest="enable_thinking", action="store_false")
    add("--chat-format", help="llama-3.1, chatml, gemma, or a template; default: the checkpoint's")

    add = command(importance, "Measure with virtual gates how much prefill and decode need each layer.").add_argument
    model_options(add)
    add("files", help="texts from which prompts are cut; default: a built-in set", nargs="*", metavar="FILE")
    integer(add, "--samples", "number of prompts", 200)
    integer(add, "--prompt-tokens", "tokens of a prompt", 256)
    integer(add, "--response-tokens", "the most tokens of a sampled response", 64)
    integer(add, "--batch-size", "prompts in one batch", 8)
    integer(add, "--seed", "the same seed gives the same scores", 0)
    add("--out", help="write the scores to this JSON file", metavar="FILE")

    text = "Make a plan for a model, and judge it. What is not given is decided. After Ctrl-C, repeat the command."
    add = command(calibrate, text).add_argument
    model_options(add)
    add("files", help="texts that resemble the prompts to come; default: a built-in set", nargs="*", metavar="FILE")
    text = "the speedup that the shapes must allow for 2,048 tokens (1.4)"
    add("--speedup", help=text, type=float, default=1.4, metavar="X")
    add("--layers", help="prune these, as in 10,12,14,19-29; default: as the speedup needs", metavar="LIST")
    add("--out", help="write the plan to this file; default: default.plan beside the weights", metavar="FILE")
    integer(add, "--rank", "numbers in the code of a token; default: half of the model's width")
    integer(add, "--longest", "the most tokens of a prompt to train on and to judge by", 4096)
    integer(add, "--steps", "steps of distillation after the closed form", 150)
    integer(add, "--seed", "chooses the windows that are held out, and what the steps train on", 0)

    text = (
        "Compare a plan with the full model, on texts and on questions. The exit status is 0 if the plan holds, else 1."
    )
    add = command(check, text).add_argument
    model_options(add)
    add("prune", help="a saved plan's path or name, or another value of --prune", metavar="PLAN")
    add("files", help="texts that the plan was not fitted to; default: a built-in set", nargs="*", metavar="TEXT")
    integer(add, "--longest", "tokens of the longest prompts", LENGTHS[-1])
    integer(add, "--questions", "questions of each kind and length", 12)

    add = command(plans, "Print saved plans: how they were calibrated, their loss and their speedup.").add_argument
    add("files", help="saved plans; default: list those that are here", nargs="*", metavar="FILE")

    command(models, "List the known models, how large they are, and where their weights are.")

    add = command(download, "Download a model. Gated models of the Hugging Face Hub need HF_TOKEN.").add_argument
    add("model", help="a name that `pop models` lists, or a repository with a supported architecture", metavar="NAME")
    add("--revision", help="a branch, tag or commit; default: the newest commit")
    return parser, commands.choices
