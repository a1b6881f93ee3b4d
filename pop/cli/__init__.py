"""The `pop` command. May import every other package; no package imports this one."""

import sys

from pop.cli.parser import parse
from pop.cli.terminal import exit_status


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status. argv: without the program's name; None takes sys.argv."""
    args = parse(sys.argv[1:] if argv is None else argv)

    def run() -> int | None:
        from pop.cli import commands  # here, because it takes seconds, in which Ctrl-C shows no traceback

        return commands.run(args)

    return exit_status("pop", run)
