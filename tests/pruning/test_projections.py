"""Refit projections: their input, and their copies on a device. tests/calibration fits them and checks their values."""

import pickle

import torch

from pop.pruning.projections import KVProjections


def random_projections(taps: int, layers=(1, 3)) -> KVProjections:
    """For a model of width 5 with six rows of K and of V."""
    random = torch.Generator().manual_seed(taps)
    weight, bias = torch.randn(len(layers), 2, 6, taps * 5, generator=random), torch.randn(2, 2, 6, generator=random)
    return KVProjections(layers, weight, bias, "", taps)


def test_one_tap_reads_the_token_and_two_taps_also_the_one_before():
    x, previous = torch.arange(15.0).view(1, 3, 5), torch.full((1, 5), -1.0)
    assert random_projections(1).inputs(x, previous) is x
    found = random_projections(2).inputs(x, previous)  # [1, 3, 10]
    assert torch.equal(found[..., :5], x)
    assert torch.equal(found[:, 1:, 5:], x[:, :-1]) and torch.equal(found[:, 0, 5:], previous)


def test_a_copy_has_the_chosen_rows_and_dtype_and_is_kept():
    refit, cpu = random_projections(2), torch.device("cpu")
    assert refit.to(cpu, torch.float32) is refit
    part = refit.to(cpu, torch.bfloat16, [4, 1])
    assert torch.equal(part.weight, refit.weight[:, :, [4, 1]].bfloat16())
    assert torch.equal(part.bias, refit.bias[:, :, [4, 1]].bfloat16())
    assert (part.layers, part.taps, part.rows) == (refit.layers, refit.taps, [4, 1])
    assert refit.to(cpu, torch.bfloat16, [4, 1]) is part
    assert refit.to(cpu, torch.bfloat16) is not part
    assert pickle.loads(pickle.dumps(refit)) == refit
