"""Progress bars on stderr, where tqdm is installed."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(label: str, total: int, unit: str, wanted: bool = True) -> Iterator[Callable[[int], object]]:
    """Show a bar while the block runs; yield a function that takes the number of units completed since its last call.

    Every thread may call the function. A negative number takes units back. The `label` says what takes time, and
    `total` is the number of units that complete it. A bar in bytes ("B") shows kB, MB and GB.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda count: None
        return
    lock = threading.Lock()

    def step(count: int) -> None:
        with lock:
            bar.update(count)

    with tqdm(total=total, desc=label, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B") as bar:
        yield step
