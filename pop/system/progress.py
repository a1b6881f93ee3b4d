"""Progress on stderr: a bar where tqdm is installed, otherwise a line every few seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 5  # seconds between lines


@contextlib.contextmanager
def progress_bar(label: str, total: int, unit: str, wanted: bool = True) -> Iterator[Callable[..., object]]:
    """Show progress while the block runs; yield a function that takes the units completed since its last call.

    The function also takes a note to show beside the bar. Every thread may call it. A negative number takes units
    back. The `label` says what takes time, and `total` is the number of units that complete it. A bar in bytes ("B")
    shows kB, MB and GB.
    """
    if not wanted:
        yield lambda count, note="": None
        return
    try:
        from tqdm import tqdm as make
    except ImportError:
        make = _Lines
    lock = threading.Lock()

    def step(count: int, note: str = "") -> None:
        with lock:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(count)

    with make(total=total, desc=label, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B") as bar:
        yield step


class _Lines(contextlib.nullcontext):
    """The part of tqdm's bar that `progress_bar` uses, in plain lines."""

    def __init__(self, total: int, desc: str, **units):
        super().__init__(self)
        self.total = total
        self.label = desc
        self.done = 0
        self.note = ""
        self.due = time.monotonic() + EVERY

    def set_postfix_str(self, note: str, refresh: bool) -> None:
        self.note = note

    def update(self, count: int) -> None:
        self.done += count
        if time.monotonic() >= self.due:
            print(f"{self.label}: {self.done / self.total:.0%} {self.note}".rstrip(), file=sys.stderr, flush=True)
            self.due = time.monotonic() + EVERY
