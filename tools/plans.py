"""Make distilled plans of SmolLM2-135M: `python -m tools.plans third`, or `14`, which ship with the package, or `18`.

They are distilled on the built-in texts, and on parts of Python's documentation and standard library as the running
interpreter has them. So another version of Python gives other plans. --resume keeps unfinished work.
"""

import argparse
import dataclasses
import random
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pop
from pop.calibration.calibrate import LENGTHS
from pop.calibration.texts import builtin_texts
from tools.common import ROOT, exit_status

LAST = 32  # tokens at full depth in distillation
SELECTING = 18  # the layer that selects tokens, since it looks answers up; see tools/evaluate/README.md
HELD_OUT = 16  # windows
CHARACTERS = 4000  # of each text of Python's
DOCUMENTS = 24  # texts from Python's documentation
MODULES = 36  # texts from its standard library


class Recipe(NamedTuple):
    """How a plan is made."""

    layers: tuple[int, ...]  # the pruned ones
    rank: int
    steps: int  # of distillation
    last: int  # tokens at full depth in the finished plan
    share: float  # of the other tokens that are selected


PLANS = {
    "third": Recipe(tuple(range(20, 30)), rank=240, steps=400, last=96, share=0.06),
    "14": Recipe((10, 12, 14, *range(19, 30)), rank=128, steps=350, last=64, share=0.05),
    "18": Recipe((5, 6, 8, 9, 11, 12, 14, *range(19, 30)), rank=160, steps=350, last=56, share=0.025),
}


def python_texts(seed: int = 0) -> list[str]:
    """Random parts of Python's documentation and of modules of its standard library."""
    rng = random.Random(seed)
    library = Path(sysconfig.get_paths()["stdlib"])
    code = [file.read_text(encoding="utf-8", errors="ignore") for file in sorted(library.glob("*.py"))]
    texts = []
    for source, count in ((topics.values(), DOCUMENTS), (code, MODULES)):
        long_enough = [text for text in source if len(text) > CHARACTERS]
        for text in rng.sample(long_enough, count):
            begin = rng.randrange(len(text) - CHARACTERS)
            texts.append(text[begin : begin + CHARACTERS])
    return texts


def with_full_depth(model, plan: pop.PrunePlan, last: int, share: float) -> pop.PrunePlan:
    """The plan with more last tokens and a share of selected ones. Its record keeps the loss without them."""
    plan = dataclasses.replace(plan, full_depth_last=last, full_depth_selected=share, selecting_layer=SELECTING)
    limits = {f"{length} tokens": round(plan.speedup(model, length), 3) for length in LENGTHS}
    changed = f"last {last} tokens, and a share of {share} that layer {SELECTING} selects, since the loss was measured"
    return dataclasses.replace(plan, about=plan.about | {"full_depth": changed, "speedup_limit": limits})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--out", help="default: its place in the package")
    parser.add_argument("--resume", help="a file that keeps unfinished work")
    options = parser.parse_args()
    recipe = PLANS[options.plan]
    model = pop.load("smollm2-135m", compile=False, prune=None)
    plan = pop.calibrate(
        model,
        builtin_texts() + python_texts(),
        pop.PrunePlan(recipe.layers, full_depth_last=LAST),
        rank=recipe.rank,
        steps=recipe.steps,
        held_out=HELD_OUT,
        resume=options.resume,
    )
    plan = with_full_depth(model, plan, recipe.last, recipe.share)
    plan.save(options.out or ROOT / f"pop/data/plans/smollm2-135m-{options.plan}.plan")
    print(plan.about)


if __name__ == "__main__":
    sys.exit(exit_status("plans", main))
