"""Lets Ctrl-C end the `pop` command without a traceback while it imports. pop/__init__.py imports this file first."""

import os
import signal
import sys

# The name of the installed command, or what `python -m pop` has there while it imports the package.
IS_COMMAND = os.path.basename(sys.argv[0]) in ("pop", "-m")
BEFORE = signal.getsignal(signal.SIGINT)
IS_QUIET = IS_COMMAND and BEFORE is signal.default_int_handler

if IS_QUIET:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if IS_QUIET:
        signal.signal(signal.SIGINT, BEFORE)
