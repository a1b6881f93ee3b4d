"""Mixtures of experts: one token's way by hand, and the forms of its computation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny import experts_one_by_one, experts_transposed, tiny_qwen3_moe_config, write_weights
from support.torch_calls import calls_of

from pop.backends.experts import few_tokens
from pop.backends.tensor_parallel import Part
from pop.checkpoints.weights import load_weights
from pop.models.experts import by_expert


def draw_tokens(count, experts, k, seed=0):
    """x [N, 6], chosen and shares [N, k], gate_up [X, 10, 6], down [X, 6, 5]."""
    drawn = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts, generator=drawn)[:k] for _ in range(count)])
    shapes = (count, 6), (count, k), (experts, 10, 6), (experts, 6, 5)
    x, shares, gate_up, down = (torch.randn(shape, generator=drawn) for shape in shapes)
    return x, chosen, shares.softmax(-1), gate_up, down


def by_hand(x, chosen, shares, gate_up, down):
    """Token by token, expert by expert."""
    rows = []
    for token, row in enumerate(x):
        out = torch.zeros_like(row)
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            gate, up = gate_up[expert, :5] @ row, gate_up[expert, 5:] @ row
            out += share * (down[expert] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_every_token_goes_through_its_experts(count, experts, k, seed):
    tokens = draw_tokens(count, experts, min(k, experts), seed)
    expected = by_hand(*tokens)
    assert torch.allclose(by_expert(*tokens), expected, atol=1e-5)
    assert torch.allclose(few_tokens(*tokens), expected, atol=1e-5)


def test_a_layer_waits_once_for_a_gpu():
    """torch documents that bincount waits, which tolist does anyway."""
    _, called = calls_of(by_expert, *draw_tokens(20, 5, 2))
    names = [getattr(function, "__name__", "") for function, *_ in called]
    assert [name for name in names if name in ("tolist", "item", "bincount", "nonzero", "unique")] == ["tolist"]


def test_an_expert_that_no_token_takes_is_not_read():
    """Prefill reads the experts that its tokens choose. Decode reads k experts."""
    x, chosen, shares, gate_up, down = draw_tokens(4, 9, 2)
    chosen[:] = torch.tensor([3, 5])
    gate_up[[0, 1, 2, 4, 6, 7, 8]] = float("nan")
    out, called = calls_of(by_expert, x, chosen, shares, gate_up, down)
    assert out.isfinite().all()
    products = [args[0].shape[-2] for function, args, _ in called if function is F.linear]
    assert products == [4, 4, 4, 4]  # tokens: gate and up, down; twice
    assert few_tokens(x, chosen, shares, gate_up, down).isfinite().all()


@pytest.mark.parametrize(("layout", "size"), [(dict, 1), (dict, 3), (experts_one_by_one, 3), (experts_transposed, 2)])
def test_each_process_reads_its_part_of_any_layout(tmp_path, layout, size):
    """Of each expert, every process has a share of gate, of up and of down. One process has all."""
    config = tiny_qwen3_moe_config(num_kv_heads=6)
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
        begin, end = rank * 14 // size, (rank + 1) * 14 // size
        for layer in range(config.num_layers):
            name = f"model.layers.{layer}.mlp.experts"
            whole = before[f"{name}.gate_up_proj"]
            expected = torch.cat([whole[:, begin:end], whole[:, 14 + begin : 14 + end]], 1)
            assert torch.equal(found[f"{name}.gate_up_proj"], expected)
            assert torch.equal(found[f"{name}.down_proj"], before[f"{name}.down_proj"][..., begin:end])
        assert torch.equal(found["model.layers.2.mlp.gate.weight"], before["model.layers.2.mlp.gate.weight"])
        assert part.num_parameters == sum(tensor.numel() for tensor in before.values())
