"""Measure on a GPU what was estimated without one, and print both side by side.

    python -m tools.gpu_report                                # all parts, about an hour on an H100
    python -m tools.gpu_report attention decode --layers 8    # some of them, on a shorter model

Each part runs in a process of its own, for at most --limit seconds: a CUDA error ends all work of its process on the
GPU, and a kernel may hang. Each figure is a JSON line as soon as it is measured, and a row of the table at the end. The
exit status is 1 if a part failed, or measured with a slower fallback; the table then says which.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

import pop
from pop.errors import InputError, check_count
from tools.common import ROOT, commit, exit_status, machine, names_in, progress, table
from tools.gpu_report import parts
from tools.gpu_report.estimates import SHAPE, TARGETS, estimates

LIMIT = 480  # seconds of a part
DRIVER = Path("/proc/driver/nvidia/version")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("parts", nargs="*", help=f"any of {', '.join(parts.PARTS)} (all)")
    option("--layers", type=int, help="shorten the model to N layers", metavar="N")
    option("--shape", help=f"as in tools.bench ({SHAPE})", default=SHAPE)
    option("--lengths", help="of prefills (512,2048,8192)", default="512,2048,8192", metavar="N,...")
    option("--device", help="(cuda)", default="cuda")
    option("--limit", type=int, help=f"seconds of a part ({LIMIT})", default=LIMIT, metavar="S")
    option("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    lines = []
    status = exit_status("gpu_report", lambda: _run(args, argv, lines))
    return status or int(any(line.get("fallbacks") or "failed" in line for line in lines))


def _run(args, argv: list[str], lines: list[dict]) -> None:
    """Measure one part in this process, or each part in a process of its own. Append what they print to `lines`."""
    names = names_in("parts", ",".join(args.parts or parts.PARTS), tuple(parts.PARTS))
    check_count("--limit", args.limit)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} finds no GPU that it can use; run gpu_report where there is one, install a "
            "build of torch for CUDA, or update the driver if a warning calls it too old"
        )
    setup = parts.Setup(args)
    if args.child:
        measure(setup, names[0])
        return
    driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else None
    versions = {"cuda": torch.version.cuda, "driver": driver, "pop": pop.__version__, "commit": commit()}
    say({"machine": machine(setup.device), **versions})
    options = [word for word in argv if word not in names]
    for name in names:
        progress(name)
        for line in in_child(name, options, args.limit):
            say(line)
            lines.append(line)
    print("\n" + summary(lines, estimates(of_model=args.shape == SHAPE and args.layers is None)))


def measure(setup: parts.Setup, name: str) -> None:
    """Print the figures of a part, and what it could only measure with a fallback."""
    try:
        for what, value, unit in parts.PARTS[name](setup):
            say({"part": name, "what": what, "value": value, "unit": unit})
    except Exception as error:  # the other parts can still be measured
        say({"part": name, "failed": f"{type(error).__name__}: {error}"[:500]})
    say({"part": name, "fallbacks": parts.fallbacks(setup)})


def say(line: dict) -> None:
    print(json.dumps(line), flush=True)


def in_child(name: str, options: list[str], limit: float) -> Iterator[dict]:
    """Yield the lines of a part as soon as its process prints them. A process that takes too long is killed.

    A process that ends before its last line has failed, whatever its status.
    """
    command = [sys.executable, "-m", "tools.gpu_report", "--child", name, *options]
    variables = os.environ | parts.VARIABLES.get(name, {})
    # In its own process group, with the processes that it starts.
    child = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    was_late = threading.Event()

    def kill() -> None:
        was_late.set()
        os.killpg(child.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    try:
        for text in child.stdout:
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            yield line
            if "fallbacks" in line:  # the last one; a process may hang as it exits
                return
        child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if was_late.is_set():
        yield {"part": name, "failed": f"it took more than {limit} seconds"}
    else:
        yield {"part": name, "failed": f"its process ended with status {child.returncode}"}


def summary(lines: list[dict], expected: dict[str, str]) -> str:
    """The table: for each figure its estimate, its target, its value, and whether it was measured, and how."""
    targets = {what: target for what, target in TARGETS.items() if what in expected}
    slow = {line["part"] for line in lines if line.get("fallbacks")}
    rows = [["", "estimate for an H100", "target", "measured", "state"]]
    for line in lines:
        if "what" in line:
            value = line["value"]
            shown = value if isinstance(value, str) else f"{value:,.4g} {line['unit']}".rstrip()
            state = "fallback" if line["part"] in slow else "measured"
            rows.append([line["what"], expected.pop(line["what"], ""), targets.get(line["what"], ""), shown, state])
        elif "failed" in line:
            rows.append([line["part"], "", "", "", f"failed: {line['failed'].splitlines()[0][:60]}"])
        for fallback in line.get("fallbacks", ()):
            rows.append([line["part"], "", "", "", f"fallback: {fallback}"])
    rows += [[what, value, targets.get(what, ""), "", "estimated"] for what, value in expected.items()]
    return table(rows, words=(0, 1, 2, 3, 4))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part's process too, unlike the default
    sys.exit(main())
