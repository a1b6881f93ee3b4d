"""The command line of `pop`. This file does without torch, so `pop --help` and `pop --version` are quick."""

import argparse
from collections.abc import Callable

from pop.system import __version__

EXAMPLES = """\
pop generate smollm2-135m "The capital of France is" --max-new-tokens 16
pop generate llama3.1-8b --prompt-file report.txt --prune my.plan
pop chat smollm2-135m --system "Answer in one sentence."
pop chat qwen3-vl-2b "What is this?" --image cat.jpg
pop importance llama3.1-8b
pop importance smollm2-135m notes.txt --samples 50 --out scores.json
pop calibrate smollm2-135m notes.txt --out my.plan
pop calibrate llama3.1-8b notes.txt mails.txt --layers 10,12,14,19-29
pop check smollm2-135m my.plan
pop check llama3.1-8b my.plan letters.txt --longest 1024
pop plans
pop plans my.plan
pop models
pop models | grep yes
pop download llama3.2-1b-instruct
pop download OWNER/REPOSITORY --revision main
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments. Those without a name may also follow options, which a subparser by itself does not take."""
    parser, commands = _parser()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv or ["--help"])


def _examples(command: str = "") -> dict:
    """The options of a parser that make its help end with two examples."""
    lines = [line for line in EXAMPLES.splitlines() if line.startswith(f"pop {command}")]
    return {
        "epilog": "\n  ".join(["examples:", *lines[:2]]),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def integer(add, name: str, text: str, default: int | None = None) -> None:
    shown = text if default is None else f"{text} ({default})"
    add(name, help=shown, type=int, default=default, metavar="N")


def files(add, text: str) -> None:
    add("files", help=text, nargs="*", default=[], metavar="FILE")


def model_options(add) -> None:
    add("model", help="a name in `pop models`, OWNER/REPOSITORY, or a directory", metavar="NAME_OR_DIR")
    add("--dtype", help="default: the checkpoint's", choices=("float32", "bfloat16", "float16"))
    add("--device", help="cpu, cuda, cuda:1 ...; default: the GPU if there is one")
    add("--no-compile", help="run eagerly", dest="compile", action="store_const", const=False)


def generation_options(parser) -> Callable:
    """Add what `generate` and `chat` share. Return the function that adds more options about the prompt."""
    model_options(parser.add_argument_group("model").add_argument)
    parser.add_argument_group("pruning").add_argument(
        "--prune",
        help="the layers prefill skips: default (the best plan known for the weights), third (the deepest), none, a "
        "fraction, layers such as 10,12,19-29, a saved plan's path or name, or the file of `pop importance`",
        default="default",
    )
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
        add(
            f"--{kind}",
            help=f"show this {kind} before the text, or where `generate` finds its mark; may be repeated",
            action="append",
            default=[],
            metavar="FILE",
        )
    integer(add, "--min-pixels", "enlarge images to this many pixels; default: the checkpoint's limit")
    integer(add, "--max-pixels", "shrink images to this many pixels; default: the checkpoint's limit")
    integer(add, "--max-seq-len", "the most tokens of prompt and answer together; default: the full context")
    return add


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="pop", description="Language models with prefill-only pruning.", **_examples()
    )
    parser.add_argument("--version", action="version", version=f"pop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text.replace(". ", ".\n"), **_examples(name))
        added.set_defaults(command=name)
        return added

    added = command("generate", "Continue a text, and print the continuation as it comes.")
    add = generation_options(added)
    add("prompt", help="the text, or - for the standard input", nargs="?", metavar="PROMPT")
    add("--prompt-file", help="read the text from this file")

    added = command("chat", "Talk to an instruct model. Without a MESSAGE, each line of the standard input is one.")
    add = generation_options(added)
    add("prompt", help="answer this and end; - reads the whole standard input", nargs="?", metavar="MESSAGE")
    add("--system", help="the system message")
    add("--no-thinking", help="ask a model to answer at once", dest="enable_thinking", action="store_false")
    add("--chat-format", help="llama-3.1, chatml, gemma, or a template; default: the checkpoint's")

    add = command("importance", "Measure with virtual gates how much prefill and decode need each layer.").add_argument
    model_options(add)
    files(add, "texts to cut prompts from; default: a built-in set")
    integer(add, "--samples", "number of prompts", 200)
    integer(add, "--prompt-tokens", "tokens of a prompt", 256)
    integer(add, "--response-tokens", "the most tokens of a sampled response", 64)
    integer(add, "--batch-size", "prompts in one batch", 8)
    integer(add, "--seed", "the same seed gives the same scores", 0)
    add("--out", help="write the scores to this JSON file", metavar="FILE")

    add = command(
        "calibrate",
        "Make a plan for a model, and judge it. What is not given is decided. After Ctrl-C, repeat the command.",
    ).add_argument
    model_options(add)
    files(add, "texts, or conversations in .jsonl, that resemble the prompts to come; default: a built-in set")
    add(
        "--speedup",
        help="the speedup that the shapes must allow for 2,048 tokens (1.4)",
        type=float,
        metavar="X",
    )
    add(
        "--layers", help="prune these, as in 10,12,14,19-29; default: as the speedup needs", dest="plan", metavar="LIST"
    )
    add("--out", help="write the plan to this file; default: default.plan beside the weights", metavar="FILE")
    integer(add, "--rank", "numbers in the code of a token; default: half of the model's width")
    integer(add, "--longest", "the most tokens of a prompt to train on and to judge by", 4096)
    integer(add, "--steps", "steps of distillation after the closed form", 50)
    integer(add, "--seed", "chooses the windows that are held out, and what the steps train on", 0)

    add = command(
        "check",
        "Compare a plan with the full model, on texts and questions. Exits with 0 if the plan holds, otherwise 1.",
    ).add_argument
    model_options(add)
    add("prune", help="a saved plan's path or name, or another value of --prune", metavar="PLAN")
    files(add, "texts, or conversations in .jsonl, that the plan was not fitted to; default: a built-in set")
    integer(add, "--longest", "tokens of the longest prompts", 4096)
    integer(add, "--questions", "questions of each kind and length", 12)
    integer(add, "--seed", "another seed asks other questions", 0)

    add = command("plans", "Print saved plans: what they keep, and for a FILE, how it was calibrated.").add_argument
    files(add, "saved plans; default: list those that are here")

    command("models", "List the known models, how large they are, and where their weights are.")

    add = command("download", "Download a model. Gated models of the Hugging Face Hub need HF_TOKEN.").add_argument
    add("model", help="a name that `pop models` lists, or a repository with a supported architecture", metavar="NAME")
    add("--revision", help="a branch, tag or commit; default: the newest commit")
    return parser, commands.choices
