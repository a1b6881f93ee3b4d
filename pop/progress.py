"""Progress on stderr: a bar, or a line now and then where tqdm is not installed."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 10  # seconds between two lines


@contextlib.contextmanager
def progress_bar(label: str, total: int, unit: str, wanted: bool = True) -> Iterator[Callable[[int], object]]:
    """Show a bar while the block runs; yield a function to call with the number of units that have been completed.

    Every thread may call the function. A negative number takes units back.

    Args:
        label: what takes time.
        total: the number of units that complete it.
        unit: such as "tokens". "B" means bytes, which a bar shows in kB, MB and GB.
        wanted: False shows nothing.
    """
    if not wanted:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield _lines(label, total, unit)
        return
    lock = threading.Lock()

    def step(count: int) -> None:
        with lock:
            bar.update(count)

    with tqdm(total=total, desc=label, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B") as bar:
        yield step


def note(line: str) -> None:
    """Print a line on stderr, above any bar. Every thread may call this."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(line, file=sys.stderr)
    else:
        tqdm.write(line, file=sys.stderr)


def _lines(label: str, total: int, unit: str) -> Callable[[int], None]:
    """Return the function to call with completed units; it prints a line at most every EVERY seconds."""
    done = before = 0
    told, lock = time.monotonic(), threading.Lock()

    def step(count: int) -> None:
        nonlocal done, before, told
        with lock:
            done, now = done + count, time.monotonic()
            if now - told >= EVERY:
                rate = (done - before) / max(now - told, 1e-9)
                print(f"{label}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s", file=sys.stderr)
                before, told = done, now

    return step
