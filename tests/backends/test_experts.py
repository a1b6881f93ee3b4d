"""Mixtures of experts: one token's way by hand, the forms of its computation, and the parts of several processes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.meta_device import META, device_only
from support.tiny import experts_one_by_one, experts_transposed, tiny_qwen3_moe_config, write_weights
from support.torch_calls import calls_of

from pop.backends import experts
from pop.backends.tensor_parallel import Part
from pop.checkpoints.weights import load_weights
from pop.models.config import ExpertsConfig
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


def by_hand(x, chosen, shares, gate_up, down):
    """Token by token, expert by expert."""
    rows = []
    for token, row in enumerate(x):
        out = torch.zeros_like(row)
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate, up = gate_up[expert, :INNER] @ row, gate_up[expert, INNER:] @ row
            out += share * (down[expert] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_every_token_goes_through_its_experts(count, num_experts, k, seed):
    tokens = draw(count, num_experts, min(k, num_experts), seed, torch.float64)
    expected = by_hand(*tokens)
    assert torch.allclose(by_expert(*tokens), expected, atol=1e-5)
    assert torch.allclose(experts.few_tokens(*tokens), expected, atol=1e-5)


def test_a_layer_waits_once_for_a_gpu():
    """torch documents that bincount waits, which tolist does anyway."""
    _, called = calls_of(by_expert, *draw(20, 5, 2))
    names = [getattr(function, "__name__", "") for function, *_ in called]
    assert [name for name in names if name in ("tolist", "item", "bincount", "nonzero", "unique")] == ["tolist"]


def test_an_expert_that_no_token_takes_is_not_read():
    """Prefill reads the experts that its tokens choose. Decode reads k experts."""
    x, chosen, shares, gate_up, down = draw(4, 9, 2)
    chosen[:] = torch.tensor([3, 5])
    gate_up[[0, 1, 2, 4, 6, 7, 8]] = float("nan")
    out, called = calls_of(by_expert, x, chosen, shares, gate_up, down)
    assert out.isfinite().all()
    products = [args[0].shape[-2] for function, args, _ in called if function is F.linear]
    assert products == [4, 4, 4, 4]  # tokens: gate and up, down; twice
    assert experts.few_tokens(x, chosen, shares, gate_up, down).isfinite().all()


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
        error = (function(*tokens).double() - exact).abs().max().item()
        allowed = bound * exact.abs().max().item()
        assert error < allowed, f"{function.__name__} is off by {error:.2g}, and {allowed:.2g} is allowed"


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


LAYOUTS = [(dict, 1), (dict, 3), (experts_one_by_one, 3), (experts_transposed, 1), (experts_transposed, 2)]


@pytest.mark.parametrize(
    ("layout", "size", "width"), [*((*one, width) for one in LAYOUTS for width in (14, 15, 30)), (dict, 6, 3)]
)
def test_each_process_reads_its_part_of_any_layout(tmp_path, layout, size, width):
    """Of each expert, every process has a share of gate, of up and of down. One process has all.

    If experts are 15 or 30 wide, gate and up together, or down, are square, so shapes do not tell the layout. Of
    experts that are 3 wide, three of six processes have no share.
    """
    config = tiny_qwen3_moe_config(num_kv_heads=6, experts=ExpertsConfig(count=7, per_token=3, width=width))
    write_weights(tmp_path, config, seed=3)
    before = load_file(tmp_path / "model.safetensors")
    saved = dict(before)
    layout(saved)
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, tmp_path / "model.safetensors")
    for rank in range(size):
        part = Part(config, rank, size)
        module = part.build()
        load_weights(tmp_path, module, shards=part.shards, dtype=torch.float32, device="cpu", progress=False)
        found = dict(module.named_parameters())
        begin, end = rank * width // size, (rank + 1) * width // size
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}.mlp.experts"
            whole = before[f"{name}.gate_up_proj"]
            expected = torch.cat([whole[:, begin:end], whole[:, width + begin : width + end]], 1)
            assert torch.equal(found[f"{name}.gate_up_proj"], expected)
            assert torch.equal(found[f"{name}.down_proj"], before[f"{name}.down_proj"][..., begin:end])
        assert torch.equal(found["model.layers.2.mlp.gate.weight"], before["model.layers.2.mlp.gate.weight"])
        assert part.num_parameters == sum(tensor.numel() for tensor in before.values())
