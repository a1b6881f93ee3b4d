"""A tiny model and samples for virtual gates."""

import numpy as np
import pytest
from support.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config(), plan=0.6)


@pytest.fixture(scope="module")
def samples():
    """Pairs of different lengths."""
    random = np.random.RandomState(1)
    return [(random.randint(0, 67, p).tolist(), random.randint(0, 67, r).tolist())
            for p, r in [(7, 3), (1, 4), (12, 1), (5, 6), (3, 2)]]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(samples):
    return [prompt for prompt, _ in samples]
