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

import pop
from pop.calibration.calibrate import LENGTHS
from pop.calibration.texts import builtin_texts
from tools.common import ROOT, exit_status

LAST = 32  # tokens at full depth in distillation
SELECTING = 18  # the layer that selects tokens, since it looks answers up; see tools/evaluate/README.md
HELD_OUT = 16  # windows
CHARACTERS = 4000  # of each text of Python's
DOCUMENTS, MODULES = 24, 36
# name: the pruned layers, the rank, steps of distillation, and then the last tokens and the share of selected ones
PLANS = {
    "third": (tuple(range(20, 30)), 240, 400, 96, 0.06),
    "14": ((10, 12, 14, *range(19, 30)), 128, 350, 64, 0.05),
    "18": ((5, 6, 8, 9, 11, 12, 14, *range(19, 30)), 160, 350, 56, 0.025),
}


def python_texts(seed: int = 0) -> list[str]:
    """Random parts of Python's documentation and of modules of its standard library."""
    rng, library = random.Random(seed), Path(sysconfig.get_paths()["stdlib"])
    code = [file.read_text(encoding="utf-8", errors="ignore") for file in sorted(library.glob("*.py"))]
    texts = []
    for source, count in ((topics.values(), DOCUMENTS), (code, MODULES)):
        for text in rng.sample([text for text in source if len(text) > CHARACTERS], count):
            begin = rng.randrange(len(text) - CHARACTERS)
            texts.append(text[begin : begin + CHARACTERS])
    return texts


def with_full_depth(model, plan: pop.PrunePlan, last: int, share: float, layer: int) -> pop.PrunePlan:
    """The plan with more last tokens and a share of selected ones. Its record keeps the loss without them."""
    plan = dataclasses.replace(plan, full_depth_last=last, full_depth_selected=share, selecting_layer=layer)
    limits = {f"{length} tokens": round(plan.speedup(model, length), 3) for length in LENGTHS}
    changed = f"last {last} tokens, and a share of {share} that layer {layer} selects, since the loss was measured"
    return dataclasses.replace(plan, about=plan.about | {"full_depth": changed, "speedup_limit": limits})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--out", help="default: its place in the package")
    parser.add_argument("--resume", help="a file that keeps unfinished work")
    options = parser.parse_args()
    layers, rank, steps, last, share = PLANS[options.plan]
    model = pop.load("smollm2-135m", compile=False, prune=None)
    plan, texts = pop.PrunePlan(layers, full_depth_last=LAST), builtin_texts() + python_texts()
    plan = pop.calibrate(model, texts, plan, rank=rank, steps=steps, held_out=HELD_OUT, resume=options.resume)
    plan = with_full_depth(model, plan, last, share, SELECTING)
    plan.save(options.out or ROOT / f"pop/data/plans/smollm2-135m-{options.plan}.plan")
    print(plan.about)


if __name__ == "__main__":
    sys.exit(exit_status("plans", main))
