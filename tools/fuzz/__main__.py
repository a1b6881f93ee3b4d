"""Try random inputs until the time is over, and print the seed of a case that fails.

    python -m tools.fuzz                              # every loop, a minute each
    python -m tools.fuzz plans --minutes 10 --seed 7  # one loop

Case n of a run has the seed `--seed` + n, so `--seed N --cases 1` repeats a case. The seed is printed before the case
runs: a crash and a hang, which end the process, leave it as the last line.
"""

import argparse
import faulthandler
import importlib
import random
import sys
import time
import traceback
from itertools import count

import torch

LOOPS = ("plans", "files", "configs", "server", "decode")
HANGS = 600  # seconds after which a case hangs


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
    faulthandler.enable(sys.__stderr__)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors run faster without a thread pool to wake
    try:
        passed = [run(name, args) for name in args.loops or LOOPS]
    finally:
        torch.set_num_threads(threads)
        faulthandler.cancel_dump_traceback_later()
    return 0 if all(passed) else 1


def run(name: str, args: argparse.Namespace) -> bool:
    """Run a loop, and print what it has tried. Whether all cases passed.

    A loop is a module of this package. Its `Loop(model)` has `try_one(random)`, which raises an exception if a case
    fails, and `summary()`.
    """
    began = time.monotonic()
    seed = args.seed
    try:
        loop = importlib.import_module(f"tools.fuzz.{name}").Loop(args.model)
        for number in count():
            if number and (number == args.cases or time.monotonic() - began >= 60 * args.minutes):
                break
            seed = args.seed + number
            print(f"\r{name}: seed {seed} ", end="", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(HANGS, exit=True, file=sys.__stderr__)
            torch.manual_seed(seed)
            loop.try_one(random.Random(seed))
    except Exception:
        traceback.print_exc()
        print(f"{name}: failed; repeat it with `python -m tools.fuzz {name} --seed {seed} --cases 1`", flush=True)
        return False
    seconds = time.monotonic() - began
    print(f"\r{name}: {number} cases in {seconds:.0f} s from seed {args.seed}; {loop.summary()}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
