"""Progress on stderr: a line that is rewritten on a terminal, otherwise a new line every few seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

EVERY = 5  # seconds between lines
REWRITTEN_EVERY = 0.5  # seconds, on a terminal
CLEAR = "\r\x1b[K"  # moves a terminal's cursor to the start of the line, and clears it


@contextlib.contextmanager
def progress_bar(label: str, total: int, wanted: bool = True) -> Iterator[Callable[..., object]]:
    """Show progress while the block runs; yield a function that takes the units completed since its last call.

    The function also takes a note to show beside the rest. Every thread may call it. A negative number takes units
    back. The `label` says what takes time, and `total` is the number of units that complete it.
    """
    if not wanted:
        yield lambda count, note="": None
        return
    is_terminal = sys.stderr.isatty()
    pause = REWRITTEN_EVERY if is_terminal else EVERY
    lock = threading.Lock()
    began = time.monotonic()
    due = began + pause
    done = 0

    def step(count: int, note: str = "") -> None:
        nonlocal due, done
        with lock:
            done += count
            now = time.monotonic()
            if now < due:
                return
            due = now + pause
            left = timedelta(seconds=round((now - began) * max(total - done, 0) / max(done, 1)))
            line = f"{label}: {done / max(total, 1):.0%}, {left} left {note}".rstrip()
            if is_terminal:
                print(CLEAR + line, end="", file=sys.stderr, flush=True)
            else:
                print(line, file=sys.stderr, flush=True)

    try:
        yield step
    finally:
        if is_terminal:
            print(CLEAR, end="", file=sys.stderr, flush=True)
