"""`pop plans`: what saved plans record about themselves, and which plans are here.

`pop.calibrate` makes the record, and `pop calibrate` adds the verdict.
"""

import contextlib
from pathlib import Path

from pop.calibration.search import PROMPT
from pop.calibration.verdict import table
from pop.checkpoints import registry
from pop.errors import PopError
from pop.pruning.plan import SHIPPED, PrunePlan

WIDTH = 400  # characters of a line
# How numbers of a record are shown, by their name.
NATS = "{:.4f} nats a token"
UNITS = {
    "continuation": NATS,
    "repetition": NATS,
    "beginning": NATS,
    "first": NATS,  # in plans from before 2026-12
    "copied": "{:.0%}",
    "speedup_limit": "{:.2f}x",
}


def plans(args) -> None:
    """Print each plan and its record, or a line for each plan that is here, with what `--prune` takes for it.

    What a file holds is escaped, because its author can write anything.
    """
    for path in args.files:
        plan = PrunePlan.load(path)
        print(f"{path}: {describe(plan)}")
        if plan.layers:
            print(f"  pruned layers: {', '.join(map(str, plan.layers))}")
        if plan.full_depth_below:
            print(f"  below {plan.full_depth_below} tokens: the whole model")
        if plan.selects:
            print(f"  selected by: layer {plan.selects_at}")
        for name, value in plan.about.items():
            for line in lines_of(name, value):
                print(f"  {ascii(line)[1:-1][:WIDTH]}")
    if args.files:
        return
    for path in plans_here():
        ships = path.parent == SHIPPED
        try:
            print(f"{path.stem if ships else path}: {describe(PrunePlan.load(path))}")
        except PopError as error:
            print(error)


def plans_here() -> list[Path]:
    """The plans that ship, and those beside the weights that are here."""
    found = {path for place in registry.places() for path in place.rglob("*.plan")}
    for name in registry.MODELS:  # some may be in the cache of Hugging Face
        with contextlib.suppress(PopError):
            found |= set(registry.find_weights(name).glob("*.plan"))
    return [*sorted(SHIPPED.glob("*.plan")), *sorted(found)]


def lines_of(name: str, value) -> list[str]:
    """What is printed of a record's entry. A verdict gets a table."""
    if name == "verdict":
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError, OverflowError):
            return table(value).splitlines()
    return [f"{name}: {shown(name, value)}"]


def shown(name: str, value) -> str:
    """A value of a record with its unit."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(key if key in UNITS else name, part)}" for key, part in value.items())
    if isinstance(value, float):
        return UNITS.get(name, "{}").format(value)
    return str(value)


def describe(plan: PrunePlan) -> str:
    """Say in words how a prompt is encoded with a plan, and what that keeps if its record knows."""
    if not plan.layers:
        return "the whole model"
    first = plan.layers[0]
    last = plan.layers[-1]
    is_one_run = last - first + 1 == len(plan.layers)
    text = f"without layers {first} to {last}" if is_one_run else f"without {len(plan.layers)} layers"
    if plan.full_depth_selected:
        text += f", last {plan.full_depth_last} and {plan.full_depth_selected:.0%} whole"
    elif plan.full_depth_last > 1:
        text += f", last {plan.full_depth_last} tokens whole"
    if plan.corrections is not None:
        text += ", calibrated"
    return text + plan.judgement


def speed(model, plan: PrunePlan) -> str:
    """A sentence on the speedup that a plan brings. The fastest of four prefills counts, and of four at full depth."""
    length = min(PROMPT, model.max_seq_len)
    rounds = 4 * ["none", plan]
    times = [model.generate(length * [0], max_new_tokens=1, plan=one).ttft_s for one in rounds]
    speedup = min(times[::2]) / min(times[1::2])
    return (
        f"It encodes {length:,} tokens {speedup:.2f}x as fast as at full depth, as measured on this machine; the "
        f"shapes allow {plan.speedup(model, length):.2f}x."
    )
