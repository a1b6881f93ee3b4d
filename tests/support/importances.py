"""Comparison of importance scores."""

import torch

from pop.calibration.scores import SCORES


def assert_same(actual, expected):
    """Two Importances, bit for bit."""
    assert actual.num_samples == expected.num_samples
    for name in SCORES:
        assert torch.equal(getattr(actual, name).nan_to_num(-1), getattr(expected, name).nan_to_num(-1)), name
    for name in ("attention", "mlp"):
        assert (getattr(actual, name) is None) == (getattr(expected, name) is None)
        if getattr(actual, name) is not None:
            assert_same(getattr(actual, name), getattr(expected, name))
