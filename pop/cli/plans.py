"""`pop plans`: what saved plans record about themselves."""

from pop.errors import some
from pop.pruning.plan import PrunePlan


def plans(args) -> None:
    """Print each plan and its record, which is escaped because the author of a file can write anything."""
    for path in args.files:
        plan = PrunePlan.load(path)
        print(f"{path}: {plan}")
        for name, value in plan.about.items():
            print(f"  {some([f'{name}: {value}'])}")
