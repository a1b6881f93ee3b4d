"""How a command ends, and output that is safe to show."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable

from pop.errors import PopError

CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {*b"\n\t"})  # for str.translate: these characters go


class Terminal:
    """A terminal for answers of models and texts of files. It gets no control characters, which could drive it."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(CONTROL))


def exit_status(program: str, work: Callable[[], int | None]) -> int:
    """Run `work`, and return the exit status of the program.

    It is what `work` returns (None: 0), or 2 after an error, which stderr shows in one sentence. It is 130 after
    Ctrl-C, and 141 if the reader of the output is gone.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (None: it is closed)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows "?" for it
        sys.stdout.reconfigure(errors="replace")
    output = Terminal(sys.stdout) if sys.stdout.isatty() else sys.stdout
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output):
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", "CUDA initialization")  # why torch falls back to the CPU
            status = work()
            sys.stdout.flush()
        return status or 0
    except PopError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is not None:  # the error is not about the output
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        if isinstance(error, BrokenPipeError):
            return 141  # the shell's status for a closed pipe
        print(f"{program}: the output cannot be written ({error.strerror}); free space", file=sys.stderr)
        return 2
