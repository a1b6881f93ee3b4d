"""The CPU's products and one-token attention against float64."""

import pytest
import torch
from support.compiler import requires_compiler

from pop.backends import cpu
from pop.models import layers


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 5), (4,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_every_product_is_the_same_product(monkeypatch, shape, dtype, biased):
    """`linear` picks between products by shape, dtype and processor; float64 says what they all are."""
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 24, generator=drawn).to(dtype)
    weight, bias = torch.randn(10, 24, generator=drawn).to(dtype), torch.randn(10, generator=drawn).to(dtype)
    wanted = x.double() @ weight.double().T + (bias.double() if biased else 0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for widened in ({dtype}, set()):
        monkeypatch.setattr(cpu, "WIDENED", widened)
        out = cpu.linear(x, weight, bias if biased else None)
        assert out.dtype == dtype and out.shape == wanted.shape
        assert (out.double() - wanted).abs().max() < tolerance


@requires_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# A row is summed at once, in five parts, and in none: 4099 is prime. Rows are read in four places, or in one.
@pytest.mark.parametrize(("height", "width"), [(8, 24), (7, 24), (8, 12_290), (8, 4099)])
def test_a_compiled_product_with_one_token_is_the_product(dtype, height, width):
    drawn = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, width, generator=drawn).to(dtype) for shape in ((1, 1), (height,)))
    out = torch.compile(cpu.linear, fullgraph=True)(x, weight)
    wanted = x.double() @ weight.double().T
    assert out.dtype == dtype and out.shape == wanted.shape
    assert (out.double() - wanted).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.005}[dtype] * width**0.5


@requires_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_token_attention_is_attention(dtype, rows):
    """Written out for the compiler, attention of one token is scaled_dot_product_attention's."""
    drawn = torch.Generator().manual_seed(1)
    q = torch.randn(rows, 1, 6, 10, generator=drawn).to(dtype)
    k, v = (torch.randn(rows, 7, 2, 10, generator=drawn).to(dtype) for _ in range(2))
    mask = torch.arange(7) <= torch.tensor([3, 0, 6])[:rows, None, None]
    written_out = torch.compile(cpu.one_token_attention)(q, k, v, mask, 0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    wanted = layers.masked_attention(q.double(), k.double(), v.double(), mask, 0.3)
    assert written_out.dtype == dtype
    assert (written_out.double() - wanted).abs().max() < tolerance
