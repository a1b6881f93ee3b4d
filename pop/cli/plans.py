"""`pop plans`: what saved plans record about themselves."""

from pop.errors import some
from pop.pruning.plan import PrunePlan


def plans(args) -> None:
    """Print each plan and its record, which is escaped because the author of a file can write anything."""
    for path in args.files:
        plan = PrunePlan.load(path)
        print(f"{path}: {describe(plan)}")
        for name, value in plan.about.items():
            print(f"  {some([f'{name}: {value}'])}")


def describe(plan: PrunePlan) -> str:
    """Say in words how a prompt is encoded with a plan."""
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
    return text
