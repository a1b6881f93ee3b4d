"""Mixtures of experts without a loop: equal to the loop, and without values on the host."""

import pytest
import torch
import torch.nn.functional as F
from support.meta_device import META, device_only

from pop.backends import experts
from pop.models.experts import by_expert

D, INNER = 16, 8  # rows are multiples of 16 bytes, as grouped products need
needs_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped product")


def draw(N, X, k, seed=0, dtype=torch.float32, first=0):
    """x, chosen, shares, gate_up, down. Tokens choose among the experts from `first` on."""
    drawn = torch.Generator().manual_seed(seed)
    chosen = torch.stack([first + torch.randperm(X - first, generator=drawn)[:k] for _ in range(N)])
    shapes = (N, D), (N, k), (X, 2 * INNER, D), (X, D, INNER)
    x, shares, gate_up, down = (torch.randn(shape, generator=drawn).to(dtype) for shape in shapes)
    return x, chosen, shares.float().softmax(-1).to(dtype), gate_up, down


@needs_grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "X", "k", "first"), [(1, 40, 8, 0), (1, 3, 1, 0), (999, 128, 8, 0), (50, 20, 2, 18), (50, 20, 1, 19)]
)
def test_grouped_products_of_awkward_batches(N, X, k, first, dtype):
    """One token, many tokens, most experts without tokens, and all tokens at the last expert."""
    tokens = draw(N, X, k, dtype=dtype, first=first)
    exact = by_expert(*(x.double() if x.is_floating_point() else x for x in tokens))
    bound = 1e-5 if dtype == torch.float32 else 2**-6  # three roundings of 2 ** -9 each, and sums of them
    for function in (experts.grouped, experts.few_tokens, by_expert):
        assert (function(*tokens).double() - exact).abs().max() < bound * exact.abs().max()


@needs_grouped
def test_grouped_products_have_gradients():
    """Importance differentiates through them."""
    x, chosen, shares, gate_up, down = draw(20, 6, 2)
    found = []
    for function in (experts.grouped, by_expert):
        x.grad = None
        function(x.requires_grad_(), chosen, shares, gate_up, down).square().sum().backward()
        found.append(x.grad)
    assert torch.allclose(*found, atol=1e-4)


def test_products_take_nothing_from_the_host(monkeypatch):
    """Only the loop over the experts waits for the device."""
    tokens = [x.to(META) for x in draw(32, 12, 4, dtype=torch.bfloat16)]
    few = [x[:16] for x in tokens[:3]] + tokens[3:]  # 64 pairs
    with device_only():
        assert experts.fastest(*few).shape == (16, D)
        with pytest.raises((RuntimeError, NotImplementedError)):
            experts.fastest(*tokens)
    if hasattr(F, "grouped_mm"):
        monkeypatch.setattr(experts, "can_group", lambda *tensors: True)
        monkeypatch.setattr(experts, "few_tokens", None)
        with device_only():
            assert experts.fastest(*tokens).shape == (32, D)
            assert experts.fastest(*few).dtype == torch.bfloat16


def test_cpus_keep_the_loop():
    x, *_ = tokens = draw(20, 6, 2, dtype=torch.bfloat16)
    assert not experts.can_group(x, *tokens[3:])
    assert torch.equal(experts.fastest(*tokens), by_expert(*tokens, linear=experts.linear))
