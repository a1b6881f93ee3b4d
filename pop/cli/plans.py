"""`pop plans`: what saved plans record about themselves."""

from pop.cli.demo import describe
from pop.errors import some
from pop.pruning.plan import PrunePlan


def plans(args) -> None:
    """Print each plan and its record, which is escaped because the author of a file can write anything."""
    for path in args.files:
        plan = PrunePlan.load(path)
        print(f"{path}: {describe(plan.fields() | {'taps': plan.projections is not None})}")
        for name, value in plan.about.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            print(f"  {some([name]):19} {some([str(value)])}")
