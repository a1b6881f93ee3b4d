"""Bars for what takes a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(label: str, total: int, unit: str, wanted: bool = True) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, if it is wanted and tqdm is installed: yields what to call after so many units more.

    unit: such as "tokens"; "B" are bytes, told in kB, MB and GB.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda count: None
        return
    with tqdm(total=total, desc=label, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B") as bar:
        yield bar.update
