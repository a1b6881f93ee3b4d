"""Helpers that several tools share: options, files, tables, a clock and memory.

A tool is run as `python -m tools.NAME` from the root of the repository. It may import `pop`, this file and its own
package. The demo also imports the converter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch

import pop
from pop.errors import InputError, MissingExtra, PopError
from pop.system import files

ROOT = Path(__file__).resolve().parents[1]


def exit_status(program: str, work: Callable[[], object]) -> int:
    """Run `work` and return 0, or print its PopError as one line and return 2."""
    try:
        work()
    except PopError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


# ---- Options ----


def check_plot(path: str | os.PathLike) -> str:
    """The kind of plot to write to a path, "svg" or "png". Raises InputError for others, or MissingExtra."""
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise InputError(f"the plot cannot be written as {path}; give a path that ends in .svg or .png")
    if find_spec("matplotlib") is None:
        raise MissingExtra("a plot needs the package matplotlib; run `pip install matplotlib`")
    return kind


def names_in(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The names of a comma-separated list. Raises InputError for one that is not in `known`."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise InputError(f"{option} holds {name!r}; it knows {', '.join(known)}")
    return names


def integers_in(option: str, text: str) -> list[int]:
    """The integers of a comma-separated list. Raises InputError for anything else."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"{option} is {text!r}; write numbers of tokens, as in 512,1024") from None


def plan_of(text: str, model: pop.Model, mark: str) -> tuple[bool, str, pop.PrunePlan, dict]:
    """The parts of a value of --prune, [MARK:] PLAN [:LAST [:SHARE [:LAYER]]].

    Returns:
        Whether the mark is there; PLAN, as written; the plan with the changes; and these, by the names of its fields.
    """
    pattern = rf"({mark}:)?(.*?)(?::(\d+)(?::(\d+(?:\.\d+)?)(?::(\d+))?)?)?"
    marked, what, last, share, layer = re.fullmatch(pattern, text, re.S).groups()
    changes = {}
    if last:
        changes["full_depth_last"] = int(last)
    if share:
        changes["full_depth_selected"] = float(share)
    if layer:
        changes["selecting_layer"] = int(layer)
    return bool(marked), what, dataclasses.replace(model.resolve(what), **changes), changes


# ---- Files ----


def check_writable(*paths: str | None) -> None:
    """Raise InputError if figures could not be written to one of the paths that are given. Call it before the work."""
    for path in paths:
        if path is not None:
            files.check_writable(path, "the figures", InputError)


def write_figures(path: str, figures: dict) -> None:
    """Write the figures of a run as JSON, completely or not at all."""
    content = json.dumps(figures, indent=2) + "\n"
    _write(path, content.encode(), "the figures")


def write_plot(path: str, drawn: bytes) -> None:
    """Write a plot, completely or not at all."""
    _write(path, drawn, "the plot")


def _write(path: str, data: bytes, what: str) -> None:
    """Write what took long. If that fails, write it into a temporary file, and name it in the error."""
    try:
        files.write_whole(path, data, what, InputError)
    except InputError as error:
        problem = error
        with contextlib.suppress(OSError, InputError):
            spare = Path(tempfile.mkdtemp(prefix="pop-")) / Path(path).name
            files.write_whole(spare, data, what, InputError)
            problem = InputError(f"{error}; meanwhile it is in {spare}")
        raise problem from None


# ---- Tables ----


def table(rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Rows of cells as lines, each column as wide as it needs.

    Args:
        rows: the cells; the first row holds the column heads.
        words: the indices of the columns to align left. All others align right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# ---- Time ----


def timed(first: Callable[[], int], step: Callable[[int], int], steps: int) -> tuple[float, list[float]]:
    """Seconds of a prefill, and of each decode step after it, without the allocation of a cache.

    `first` returns the first new token's id, and `step` maps an id to the next. Both return a Python integer, so they
    wait for the device.
    """
    times = [time.perf_counter()]
    token = first()
    times.append(time.perf_counter())
    for _ in range(steps):
        token = step(token)
        times.append(time.perf_counter())
    ttft, *decode = (after - before for before, after in pairwise(times))
    return ttft, decode


# ---- Machine ----


def machine(device: torch.device) -> dict:
    """What the numbers were measured on: processor or GPU, torch's threads, and the versions of torch and Python."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": _device_name(device), "threads": torch.get_num_threads()} | versions


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" after it if files differ from it. None outside of a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (ROOT / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        found = re.search(r"^model name\s*: (.+)$", cpus.read_text(errors="replace"), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def progress(text: str) -> None:
    """Tell the user on stderr what happens now."""
    print(f"... {text}", file=sys.stderr, flush=True)


class Countdown:
    """Tells of the steps of a task, and of how much time they still take.

    Args:
        label: what a step is.
        total: how many steps there are.
        tell: receives a line for each step.
    """

    def __init__(self, label: str, total: int, tell: Callable[[str], None] = progress):
        self.label = label
        self.total = total
        self.tell = tell
        self.begun = 0
        self.start = time.monotonic()

    def __call__(self) -> None:
        """Tell that the next step begins."""
        line = f"{self.label} {self.begun + 1} of {self.total}"
        if self.begun:
            seconds = (time.monotonic() - self.start) / self.begun * (self.total - self.begun)
            line += f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
        self.begun += 1
        self.tell(line)


# ---- Memory ----


def resident(name: str) -> int:
    """Bytes of this process in memory, under Linux. name: VmRSS for now, VmHWM for the high-water mark."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
