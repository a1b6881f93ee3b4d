"""The `pop` command. May import every other package; no package imports this one."""

import signal
import sys

from pop.cli.parser import parse
from pop.cli.terminal import exit_status


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status. argv: without the program's name; None takes sys.argv."""
    args = parse(sys.argv[1:] if argv is None else argv)
    # Ctrl-C ends the imports, which take seconds, without a traceback.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pop.cli import commands

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return exit_status("pop", lambda: commands.run(args))
