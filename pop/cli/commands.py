"""What the commands of `pop` do. Answers go to stdout, notes and errors to stderr (terminal.py)."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pop
from pop.backends.tensor_parallel import launched
from pop.calibration.search import SHORT
from pop.calibration.texts import SHORTEST, builtin_texts, excerpt
from pop.calibration.verdict import CONTINUATION, LENGTHS, compared
from pop.checkpoints import download as downloads
from pop.checkpoints import registry
from pop.cli.plans import plans, speed
from pop.cli.texts import calibration_texts, encoded, read_file, read_text, reading
from pop.errors import InputError, PlanError, PopError, WeightsNotFound, check_count, printable
from pop.generation.sampling import Options, sampling_params
from pop.loading import usable_device
from pop.system import files
from pop.system.memory import free_bytes

# Options of the command line are handed on to the arguments that have their names.
LOADING = inspect.signature(pop.load).parameters
SAMPLING = Options.__annotations__
HELP = "/new starts a new conversation, /quit ends, /help shows this, Ctrl-C stops an answer; all else is a message."


def run(args) -> int | None:
    """Run the command that the command line names. Return its exit status, where None is 0."""
    rank, ranks = launched()
    if ranks > 1 and args.command != "generate":
        raise InputError("torchrun can start pop generate only; run this command without it")
    if ranks > 1 and args.prompt == "-":
        raise InputError("only one process can read the standard input; use --prompt-file")
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else None):  # None: print does nothing
        return COMMANDS[args.command](args)


# ---- The commands ----


def generate(args) -> None:
    if (args.prompt is None) == (args.prompt_file is None):
        raise InputError("give either a prompt or --prompt-file, but not both")
    prompt = _prompt(args) if args.prompt_file is None else read_file(args.prompt_file)
    sampling = _sampling(args)
    model = _load(args)
    for kind, mark in reversed(model.vision.marks.items()):
        if mark not in prompt:
            prompt = mark * len(getattr(args, kind)) + prompt
    _print_answer(model.stream(prompt, images=args.image, videos=args.video, **sampling))


def chat(args) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing)
    prompt = _prompt(args)
    if prompt is None:
        _standard_input()  # raises before the model is loaded
    sampling = _sampling(args)
    model = _load(args)
    (media,) = model.vision.prepare_batch(args.image, args.video, 1)
    first_parts = [{"type": one.kind, one.kind: one} for one in media]
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
        elif line == "/help":
            print(HELP, file=sys.stderr)
        else:
            try:
                _print_answer(conversation.stream(_message(parts, line), **sampling))
                parts = []  # the first message has shown the images and videos
            except KeyboardInterrupt:
                print("\n(stopped, and forgotten)", flush=True)
            except PopError as error:
                print(f"pop: {error}", file=sys.stderr)


def _message(parts: list[dict], text: str) -> str | list[dict]:
    """A message with images and videos before its text."""
    return [*parts, {"type": "text", "text": text}] if parts else text


def _typed_lines() -> Iterator[str]:
    """Yield the lines of the standard input that are not blank, until it ends or one is /quit."""
    sign = "> " if _standard_input().isatty() else ""
    if sign:
        print(HELP, file=sys.stderr)
    with contextlib.suppress(EOFError), reading("the standard input"):
        while (line := input(sign).strip()) != "/quit":
            if line:
                yield line


def importance(args) -> None:
    texts = [read_file(path) for path in args.files] or builtin_texts()
    if args.out is not None:
        files.check_writable(args.out, "the importance scores", InputError)
    args.prune = "none"  # the full model is scored
    model = _load(args)
    prompts = excerpts(model, texts, args.samples, args.prompt_tokens, args.seed)
    result = pop.importance(
        model,
        prompts,
        response_tokens=args.response_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    print(f"layer  {'prefill':>22}  {'decode':>22}")
    columns = (result.prefill, result.prefill_error, result.decode, result.decode_error)
    for layer, row in enumerate(zip(*columns, strict=True)):
        print("{:5}  {:10.4g} ± {:9.2g}  {:10.4g} ± {:9.2g}".format(layer, *row))
    least = result.plan(max(1, len(result.prefill) // 3)).layers
    print(f"\nPrefill needs this third of the layers least: layers {', '.join(map(str, least))}.")
    if args.out is not None:
        result.save(args.out)


def excerpts(model, texts: list[str], count: int, length: int, seed: int) -> list[list[int]]:
    """Cut `count` random excerpts of `length` tokens from the texts in turn. Return their ids after BOS."""
    check_count("--samples", count)
    check_count("--prompt-tokens", length)
    rng = Random(seed)
    tokens = [model.encode(text, bos=False) for text in texts]
    bos = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    return [bos + excerpt(ids, length, rng) for ids in itertools.islice(itertools.cycle(tokens), count)]


def calibrate(args) -> None:
    texts = {path: read_text(path) for path in args.files}
    if args.out is None:
        args.out = registry.find_folder(args.model) / "default.plan"
    files.check_writable(args.out, "the plan", InputError)
    resume = f"{args.out}.progress"
    kept = Path(os.path.expanduser(resume))
    lengths = _lengths(args.longest, SHORT)
    if args.plan is not None and args.speedup is not None:
        raise InputError("--layers says what is pruned, so leave out --speedup")
    args.prune = "none"
    model = _load(args)
    fitted, rest = calibration_texts(model, texts)
    compared(model, rest, lengths, least=SHORT)  # refuses now what pop.check would refuse after the work
    options = _given(args, ("plan", "speedup", "rank", "longest", "steps", "seed"))
    plan = pop.calibrate(model, fitted, resume=resume, **options)
    verdict = pop.check(model, plan, rest, lengths=lengths)
    plan = dataclasses.replace(plan, about=plan.about | {"verdict": verdict.record()})
    try:
        plan.save(args.out)
    except PlanError as error:
        if not kept.exists():  # the disk was full before
            raise
        raise PlanError(f"{error}, or make this one writable: the same command continues from {resume}") from None
    kept.unlink(missing_ok=True)
    print(verdict, speed(model, plan), sep="\n")
    if not verdict.holds:
        print("The plan is saved. Before you use it, ask for a smaller --speedup or fewer --layers, or give more text.")
    print(f"Saved to {args.out}. Try: pop generate {args.model} --prune {args.out} PROMPT")


def check(args) -> int:
    """Print the verdict on a plan. Return 0 if it holds, and 1 if not."""
    given = [read_text(path) for path in args.files]
    lengths = _lengths(args.longest, SHORTEST)
    questions = check_count("--questions", args.questions)
    model = _load(args)
    texts = [model.encode(one, "text") for text in given for one in encoded(model, text)]
    tokens = sum(map(len, texts))
    if texts and tokens < args.longest + CONTINUATION:
        print(
            f"pop: the texts have {tokens:,} tokens; longer prompts repeat them for questions, and for the KL built-in "
            "texts follow",
            file=sys.stderr,
        )
    verdict = pop.check(model, model.plan, texts or None, lengths=lengths, questions=questions, seed=args.seed)
    print(verdict, speed(model, model.plan), sep="\n")
    return int(not verdict.holds)


def _lengths(longest: int, least: int) -> list[int]:
    """The prompt lengths of a verdict, up to the longest, which must be at least `least`."""
    check_count("--longest", longest, least)
    return [*(length for length in LENGTHS if length < longest), longest]


def models(args) -> None:
    device = usable_device(None)
    free = free_bytes(device)
    line = "{:28}  {:8}  {:>15}  {:>8}  {:>8}  {:4}  {}"
    print(line.format("name", "family", "parameters", "on disk", "bfloat16", "fits", "weights"))
    for entry in registry.MODELS.values():
        size = "-"
        try:
            where = registry.find_weights(entry.name)
            size = gigabytes(sum(path.stat().st_size for path in where.iterdir() if path.is_file()))
        except WeightsNotFound:
            where = "not here"
        except PopError as error:
            where = error
        memory = 2 * entry.parameters
        fits = "?"
        if free is not None:
            fits = "yes" if memory < free else "no"
        print(line.format(entry.name, entry.family, f"{entry.parameters:,}", size, gigabytes(memory), fits, where))
    print(f"\nbfloat16: the memory of the weights. fits: whether {device} has as much that is free.")
    print(f"New weights go into {registry.weights_folder()}/NAME; `pop download NAME` fetches them.")


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def download(args) -> None:
    folder = downloads.download(args.model, args.revision)
    print(f'{args.model} is in {folder}. Try: pop generate {args.model} "Once upon a time"')


# ---- What the commands share ----


def _given(args, names) -> dict:
    """The options with these names that the command line has."""
    return {name: value for name, value in vars(args).items() if name in names and value is not None}


def _load(args):
    model = pop.load(args.model, parallel="auto", **_given(args, LOADING))
    if model.plan.layers and args.prune != "default" and launched()[0] == 0:  # pop.load shows the default plan
        print(f"pop: {printable(repr(model))}", file=sys.stderr, flush=True)
    return model


def _sampling(args) -> dict:
    """Return the options of sampling that are given. Raises InputError for a wrong one, before the model is loaded."""
    given = _given(args, SAMPLING)
    sampling_params(given, stated={})
    return given


def _print_answer(stream) -> None:
    """Print an answer as it comes."""
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)


def _prompt(args) -> str | None:
    if args.prompt != "-":
        return args.prompt
    with reading("the standard input"):
        return _standard_input().read().removeprefix("\ufeff")


def _standard_input():
    """The standard input, which raises for bytes that are not UTF-8. Raises InputError if it is closed."""
    if sys.stdin is None:
        raise InputError("there is no standard input; give the text as an argument")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="strict")  # in some locales, Python lets wrong bytes pass
    return sys.stdin


COMMANDS = {run.__name__: run for run in (generate, chat, importance, calibrate, check, plans, models, download)}
