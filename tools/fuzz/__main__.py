"""Try random inputs until the time is over, and print the seed of a case that fails.

    python -m tools.fuzz                              # every loop, a minute each
    python -m tools.fuzz plans --minutes 10 --seed 7  # one loop

Case n of a run has the seed `--seed` + n. So `--seed N --cases 1` repeats a case.
"""

from __future__ import annotations

import argparse
import sys

from tools.fuzz.harness import watch

LOOPS = ("plans", "files")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("loops", nargs="*", help=f"which of {', '.join(LOOPS)} to run (default: all)", metavar="LOOP")
    parser.add_argument("--minutes", type=float, default=1, help="for each loop (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (0)")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--model", help="what the server serves: a name or a folder (default: a tiny random model)")
    args = parser.parse_args(argv)
    unknown = {*args.loops} - {*LOOPS}
    if unknown:
        parser.error(f"there is no loop {sorted(unknown)[0]!r}; choose from {', '.join(LOOPS)}")
    passed = [watch(name, args) for name in args.loops or LOOPS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
