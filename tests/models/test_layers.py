"""The shared layers against closed forms in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.cases import randn
from support.naive_method import attention
from support.torch_calls import calls_of

from pop.models.config import RopeConfig
from pop.models.layers import RMSNorm, causal_attention, masked_attention, rope_frequencies, rope_tables


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
    cos, sin = rope_tables(positions[..., None], frequencies)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions[0, :, None].double() * 500_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    # A float32 angle of 100,000 is off by up to 0.004; half a step between positions is 0.5.
    torch.testing.assert_close(cos[0, :, 0].double(), exact.cos(), atol=0.01, rtol=0)
    torch.testing.assert_close(sin[0, :, 0].double(), exact.sin(), atol=0.01, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_by_its_definition(heads, tokens):
    H, K = heads
    S, E, scale = 7, 4, 0.3
    q, k, v = randn(2, tokens, H, E), randn(2, S, K, E, seed=1), randn(2, S, K, E, seed=2)
    mask = torch.arange(S) <= torch.tensor([[S - tokens], [0]])[..., None] + torch.arange(tokens)[:, None]

    torch.testing.assert_close(masked_attention(q, k, v, mask, scale), attention(q, k, v, mask, scale).float())
    causal = torch.ones(tokens, tokens).tril().bool().expand(2, -1, -1)
    k, v = k[:, :tokens], v[:, :tokens]
    torch.testing.assert_close(causal_attention(q, k, v, scale, None), attention(q, k, v, causal, scale).float())
    for window in range(1, tokens + 2):  # that many tokens, itself included
        seen = causal & torch.tensor([[t - s < window for s in range(tokens)] for t in range(tokens)])
        torch.testing.assert_close(causal_attention(q, k, v, scale, window), attention(q, k, v, seen, scale).float())


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("window", [None, 5])
def test_torch_gets_no_mask_where_attention_is_causal(tokens, window):
    """It has faster kernels for this. A single token is no exception, or compiled code would depend on the length."""
    q, k, v = randn(2, tokens, 4, 6), randn(2, tokens, 2, 6), randn(2, tokens, 2, 6)
    _, called = calls_of(causal_attention, q, k, v, 0.3, window)
    ((args, options),) = [call[1:] for call in called if call[0] is F.scaled_dot_product_attention]
    assert [tuple(x.shape) for x in args] == [(2, 4, tokens, 6), (2, 2, tokens, 6), (2, 2, tokens, 6)]
    assert options == {"attn_mask": None, "is_causal": True, "scale": 0.3, "enable_gqa": True}
