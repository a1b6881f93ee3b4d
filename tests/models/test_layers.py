"""The shared layers against closed forms in float64."""

import math

import pytest
import torch

from pop.models.config import RopeConfig
from pop.models.layers import RMSNorm, causal_attention, masked_attention, rope_frequencies, rope_tables, rotate


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_norm_statistics_are_float32_whatever_the_weights_are():
    """Statistics in bfloat16 would be off by far more than the rounding of the result (2 ** -8)."""
    norm = RMSNorm(4096, eps=1e-5).to(torch.bfloat16)
    norm.weight.data = (1 + 0.1 * randn(4096)).to(torch.bfloat16)
    x = (3 * randn(8, 4096, seed=1)).to(torch.bfloat16)
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    # Two roundings, after the normalisation and after the weight, in the reference's order.
    assert torch.equal(norm(x), norm.weight * exact.to(torch.bfloat16))


def test_neighbouring_positions_are_told_apart_far_out():
    positions = torch.tensor([[100_000, 100_001]])
    frequencies = rope_frequencies(RopeConfig(base=500_000.0), 8, torch.device("cpu"))
    cos, sin = rope_tables(positions, frequencies)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions[0, :, None].double() * 500_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    # A float32 angle of 100,000 is off by up to 0.004; half a step between positions is 0.5.
    torch.testing.assert_close(cos[0, :, 0].double(), exact.cos(), atol=0.01, rtol=0)
    torch.testing.assert_close(sin[0, :, 0].double(), exact.sin(), atol=0.01, rtol=0)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    frequencies = rope_frequencies(RopeConfig(base=100.0), 6, torch.device("cpu"))
    q, k = randn(1, 1, 1, 6), randn(1, 1, 1, 6, seed=1)

    def at(x, position):
        return rotate(x, rope_tables(torch.tensor([[position]]), frequencies))

    torch.testing.assert_close(at(q, 77).norm(), q.norm())
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum())
    assert not torch.allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 9) * at(k, 5)).sum(), atol=1e-3)


def test_llama3_scaling_by_its_definition():
    rope = RopeConfig(base=10_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_positions=512)  # fmt: skip
    plain = [10_000.0 ** (-2 * i / 64) for i in range(32)]
    expected = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength > 512:
            expected.append(frequency / 8)
        elif wavelength < 512 / 4:
            expected.append(frequency)
        else:
            smooth = (512 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len({expected[i] / plain[i] for i in range(32)}) > 3  # all three branches are taken
    actual = rope_frequencies(rope, 64, torch.device("cpu"))
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_by_its_definition(heads, tokens):
    H, K = heads
    S, E, scale = 7, 4, 0.3
    q, k, v = randn(2, tokens, H, E), randn(2, S, K, E, seed=1), randn(2, S, K, E, seed=2)
    mask = torch.arange(S) <= torch.tensor([[S - tokens], [0]])[..., None] + torch.arange(tokens)[:, None]

    def naive(q, k, v, mask):
        out = torch.zeros(2, q.shape[1], H, E, dtype=torch.float64)
        for b in range(2):
            for t in range(q.shape[1]):
                for h in range(H):
                    kv = h // (H // K)
                    scores = (k[b, :, kv].double() @ q[b, t, h].double()) * scale
                    weights = scores.masked_fill(~mask[b, t], -math.inf).softmax(0)
                    out[b, t, h] = weights @ v[b, :, kv].double()
        return out.flatten(2).float()

    torch.testing.assert_close(masked_attention(q, k, v, mask, scale), naive(q, k, v, mask))
    causal = torch.ones(tokens, tokens).tril().bool().expand(2, -1, -1)
    k, v = k[:, :tokens], v[:, :tokens]
    torch.testing.assert_close(causal_attention(q, k, v, scale, None), naive(q, k, v, causal))
    for window in range(1, tokens + 2):  # that many tokens, itself included
        seen = causal & torch.tensor([[t - s < window for s in range(tokens)] for t in range(tokens)])
        torch.testing.assert_close(causal_attention(q, k, v, scale, window), naive(q, k, v, seen))
