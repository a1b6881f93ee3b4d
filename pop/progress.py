"""Progress on stderr: a bar, or a line now and then where tqdm is not installed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

EVERY = 10  # seconds between two lines


@contextlib.contextmanager
def progress_bar(label: str, total: int, unit: str, wanted: bool = True) -> Iterator[Callable[[int], object]]:
    """Show a bar while the block runs; yield a function to call with the number of units that have been completed.

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
    with tqdm(total=total, desc=label, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B") as bar:
        yield bar.update


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
    told = time.monotonic()

    def step(count: int) -> None:
        nonlocal done, before, told
        done, seconds = done + count, time.monotonic() - told
        if seconds >= EVERY:
            rate = (done - before) / seconds
            print(f"{label}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s", file=sys.stderr)
            before, told = done, time.monotonic()

    return step
