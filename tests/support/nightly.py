"""Which profile of the suite runs (tests/conftest.py)."""

import os

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def thinned(cases: list, kept: list) -> list:
    """Return those cases that always run, by their numbers. In the nightly profile: all."""
    return cases if NIGHTLY else [cases[number] for number in kept]
