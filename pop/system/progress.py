"""Progress of long work: a line on stderr every few seconds."""

import sys
import threading
import time
from collections.abc import Callable

EVERY = 5  # seconds between lines


def progress_lines(label: str, total: int, wanted: bool = True) -> Callable[..., None]:
    """Return a function that takes the units completed since its last call, and shows which share of `total` is done.

    The function also takes a note to show beside the share. Every thread may call it. A negative number takes units
    back. The `label` says what takes time.
    """
    lock = threading.Lock()
    done = 0
    due = time.monotonic() + EVERY

    def step(count: int, note: str = "") -> None:
        nonlocal done, due
        with lock:
            done += count
            if wanted and time.monotonic() >= due:
                print(f"{label}: {done / total:.0%} {note}".rstrip(), file=sys.stderr, flush=True)
                due = time.monotonic() + EVERY

    return step
