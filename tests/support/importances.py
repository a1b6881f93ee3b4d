"""Comparison of importance scores."""

import torch

from pop.calibration.importance import SCORES


def assert_same(actual, expected):
    """Two Importances, bit for bit."""
    assert actual.num_samples == expected.num_samples
    for name in SCORES:
        assert torch.equal(getattr(actual, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1)), name
