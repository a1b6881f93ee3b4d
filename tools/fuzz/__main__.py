"""Try random inputs until the time is over, and print the seed of a round that fails.

    python -m tools.fuzz                              # every loop, a minute each
    python -m tools.fuzz plans --minutes 10 --seed 7  # one loop

Round n of a run has the seed `--seed` + n. It is printed before the round begins, so a crash and a hang show it.
"""

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import hypothesis
import torch
from hypothesis.strategies import randoms

LOOPS = ("plans", "files", "configs", "server", "decode")
TIMED = ("server", "decode")  # which take long, or which a seed does not repeat exactly: hypothesis is of no use
UNLIMITED = {"deadline": None, "suppress_health_check": [*hypothesis.HealthCheck]}
SETTINGS = hypothesis.settings(max_examples=20, database=None, **UNLIMITED)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("loops", nargs="*", help=f"which of {', '.join(LOOPS)} to run (default: all)", metavar="LOOP")
    parser.add_argument("--minutes", type=float, default=1, help="for each loop (1); 0 for one round")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (0)")
    parser.add_argument("--model", help="what the server serves: a name or a folder (default: a tiny random model)")
    args = parser.parse_args(argv)
    if not {*args.loops} <= {*LOOPS}:
        parser.error(f"the loops are {', '.join(LOOPS)}, and not {', '.join(args.loops)}")
    torch.set_num_threads(1)  # tiny tensors run faster without a thread pool to wake
    return min(1, sum(not run(name, args) for name in args.loops or LOOPS))


def run(name: str, args: argparse.Namespace) -> bool:
    """Run a loop, and print what it has tried. Whether all rounds passed."""
    ends = time.monotonic() + 60 * args.minutes
    seed = args.seed
    try:
        loop = importlib.import_module(f"tools.fuzz.{name}").Loop(args.model)
        while seed == args.seed or time.monotonic() < ends:
            print(f"\r{name}: seed {seed} ", end="", file=sys.stderr, flush=True)
            run_round(loop, seed, name not in TIMED)
            seed += 1
    except Exception:
        traceback.print_exc()
        again = f"python -m tools.fuzz {name} --seed {seed} --minutes 0"
        again += f" --model {args.model}" if args.model else ""
        print(f"{name}: failed; repeat it with `{again}`", flush=True)
        return False
    print(f"\r{name}: no failure with the seeds {args.seed} to {seed - 1}; {loop.summary()}", flush=True)
    return True


def run_round(loop, seed: int, several: bool) -> None:
    """Try one case, or let hypothesis try several. It looks for a smaller one than that which fails, and shows it."""

    def case(random: Random) -> None:
        torch.manual_seed(random.randrange(2**31))
        with TemporaryDirectory() as folder:
            loop.try_one(random, Path(folder))

    if several:
        hypothesis.seed(seed)(SETTINGS(hypothesis.given(randoms(use_true_random=False))(case)))()
    else:
        case(Random(seed))


if __name__ == "__main__":
    sys.exit(main())
