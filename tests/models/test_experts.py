"""Mixtures of experts: one token's way by hand, the forms of its computation, and the layouts of checkpoints.

Against the reference: tests/models/test_goldens.py and test_qwen3_vl.py. In the engine: tests/pruning/test_method.py.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.published import QWEN3_30B_A3B
from support.tiny import random_model, tiny_qwen3_moe_config, tiny_qwen3_vl_config, write_weights
from torch.overrides import TorchFunctionMode

import pop
from pop.backends.experts import one_token
from pop.backends.tensor_parallel import Part
from pop.checkpoints.config_json import READERS
from pop.checkpoints.fields import Fields
from pop.checkpoints.weights import load_weights
from pop.errors import CheckpointError, ConfigError
from pop.models import build
from pop.models.config import ExpertsConfig
from pop.models.experts import MixtureOfExperts, by_expert
from pop.pruning.cost import prefill_flops, speedup_limit
from pop.pruning.plan import PrunePlan


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
    one = tokens[0][:1], tokens[1][:1], tokens[2][:1], *tokens[3:]
    assert torch.allclose(one_token(*one), expected[:1], atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_router_chooses_the_likeliest(normalised):
    config = tiny_qwen3_moe_config(experts=ExpertsConfig(7, 3, 14, (0,), normalised))
    mixture, x = random_model(config, seed=2).layers[0].mlp, torch.randn(2, 5, 30)
    scores = (x @ mixture.gate.weight.T).softmax(-1)  # [2, 5, 7]
    shares = scores * (scores >= scores.sort(-1).values[..., -3:-2])
    if normalised:
        shares /= shares.sum(-1, keepdim=True)
    experts = zip(mixture.experts.gate_up_proj, mixture.experts.down_proj, strict=True)
    all_of_them = [(F.silu(x @ one[:14].T) * (x @ one[14:].T)) @ down.T for one, down in experts]
    expected = sum(shares[..., n, None] * out for n, out in enumerate(all_of_them))
    assert torch.allclose(mixture(x), expected, atol=1e-5)


def test_layers_without_experts_are_dense():
    kinds = [isinstance(layer.mlp, MixtureOfExperts) for layer in random_model(tiny_qwen3_moe_config()).layers]
    assert kinds == [True, False, True, True, False]


def test_an_expert_that_no_token_takes_is_not_read():
    """What prefill reads of the weights depends on the tokens; in decode it is k experts' matrices."""
    x, chosen, shares, gate_up, down = draw_tokens(4, 9, 2)
    chosen[:] = torch.tensor([3, 5])
    gate_up[[0, 1, 2, 4, 6, 7, 8]] = float("nan")
    products = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.linear:
                products.append(args[0].shape[-2])
            return function(*args, **(kwargs or {}))

    with Watch():
        assert by_expert(x, chosen, shares, gate_up, down).isfinite().all()
    assert products == [4, 4, 4, 4]  # tokens: gate and up, down; twice
    assert one_token(x[:1], chosen[:1], shares[:1], gate_up, down).isfinite().all()


# ---- checkpoints ----


def stored(folder, change):
    """The tiny model's file, with `change` made to its tensors; and the tensors as they were."""
    config = tiny_qwen3_moe_config()
    write_weights(folder, config, seed=3)
    before = load_file(folder / "model.safetensors")
    tensors = dict(before)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return config, before


def load(folder, config, shards=None, module=None):
    if module is None:
        with torch.device("meta"):
            module = build(config)
    load_weights(folder, module, dtype=torch.float32, device="cpu", progress=False, shards=shards or {})
    return dict(module.named_parameters())


def one_by_one(tensors):
    """As text models are published."""
    for name in [name for name in tensors if "experts" in name]:
        experts, _, kind = name.rpartition(".")
        for number, tensor in enumerate(tensors.pop(name)):
            if kind == "down_proj":
                tensors[f"{experts}.{number}.down_proj.weight"] = tensor
            else:
                tensors[f"{experts}.{number}.gate_proj.weight"], tensors[f"{experts}.{number}.up_proj.weight"] = (
                    tensor.chunk(2)
                )


def the_other_way_round(tensors):
    """As Qwen3-VL's are published."""
    for name in [name for name in tensors if "experts" in name]:
        tensors[name] = tensors[name].transpose(1, 2)


@pytest.mark.parametrize("layout", [dict, one_by_one, the_other_way_round])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_layouts_of_checkpoints(tmp_path, layout, size):
    """Whole, and cut among several: of each expert all have a share of gate, of up and of down."""
    config, before = stored(tmp_path, layout)
    if size == 1:
        for name, weight in load(tmp_path, config).items():
            assert torch.equal(weight, before[name]), name
        return
    widths = []
    for rank in range(size):
        part = Part(config, rank, size)
        found = load(tmp_path, config, part.shards, part.build())
        name = "model.layers.2.mlp.experts"
        begin, end = rank * 14 // size, (rank + 1) * 14 // size
        whole = before[f"{name}.gate_up_proj"]
        expected = torch.cat([whole[:, begin:end], whole[:, 14 + begin : 14 + end]], 1)
        assert torch.equal(found[f"{name}.gate_up_proj"], expected)
        assert torch.equal(found[f"{name}.down_proj"], before[f"{name}.down_proj"][..., begin:end])
        assert torch.equal(found["model.layers.2.mlp.gate.weight"], before["model.layers.2.mlp.gate.weight"])
        assert part.num_parameters == sum(tensor.numel() for tensor in before.values())
        widths.append(end - begin)
    assert sum(widths) == 14


EXPERTS = "model.layers.2.mlp.experts"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (one_by_one, lambda t: t.pop(f"{EXPERTS}.4.up_proj.weight"), rf"missing: {EXPERTS}.4.up_proj.weight"),
        (one_by_one, lambda t: t.update({f"{EXPERTS}.7.up_proj.weight": torch.zeros(14, 30)}), "surplus: .*experts.7"),
        (
            one_by_one,
            lambda t: t.update({f"{EXPERTS}.3.down_proj.weight": torch.zeros(30, 15)}),
            r"3.down_proj.weight is \[30, 15\], not \[30, 14\]",
        ),
        (dict, lambda t: t.pop(f"{EXPERTS}.down_proj"), rf"missing: {EXPERTS}.down_proj"),
        (
            dict,
            lambda t: t.update({f"{EXPERTS}.gate_up_proj": torch.zeros(6, 28, 30)}),
            r"is \[6, 28, 30\], not \[7, 28, 30\]",
        ),
        (dict, lambda t: t.pop("model.layers.0.mlp.gate.weight"), "missing: model.layers.0.mlp.gate.weight"),
    ],
)
def test_wrong_weights_are_refused_by_name(tmp_path, layout, change, message):
    config, _ = stored(tmp_path, lambda tensors: (layout(tensors), change(tensors)))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, config)


def test_a_config_that_asks_for_more_than_there_are():
    with pytest.raises(ConfigError, match=r"num_experts_per_tok \(9\) exceeds num_experts \(7\)"):
        ExpertsConfig(7, 9, 14, (0,))


# ---- what follows from it ----


def test_what_pruning_gains():
    """Of 30B parameters 3.3B work for a token, and a pruned layer saves attention and experts alike."""
    config = READERS["qwen3_moe"](Fields({k: v for k, v in QWEN3_30B_A3B.items() if k != "model_type"}))
    token = prefill_flops(config, 2, PrunePlan.none()) - prefill_flops(config, 1, PrunePlan.none())
    attention = 48 * 2 * 2 * 2 * 32 * 128  # of the second token, over two positions
    active = (token - attention) / 2
    per_layer = 2 * 2048 * 128 * (32 + 4) + 2048 * 128 + 8 * 3 * 2048 * 768
    assert active == 48 * per_layer
    assert round((active + 2 * 151_936 * 2048) / 1e9, 1) == 3.4  # both embeddings counted; published as 3.3
    assert round(speedup_limit(config, 2048, PrunePlan.deepest(48, 1 / 3)), 2) == 1.48


def test_gates_have_gradients_through_experts():
    """The importance of the MLP branch, which is that of its experts, by finite differences."""
    config = tiny_qwen3_vl_config(experts=ExpertsConfig(7, 3, 14, (0, 2, 3)))
    module = random_model(config, seed=4)
    prompt, response = [5, 9, 12, 33, 2], [7, 8, 40]
    gradients = pop.calibration.gates.gate_gradients(module, [prompt], [response])[0]  # [2, 2, L]

    def loss(scale):
        layer = module.layers[2]
        plain = layer.mlp.forward
        layer.mlp.forward = lambda x: plain(x) * scale
        logits = module(torch.tensor([prompt + response[:-1]]))[0, len(prompt) - 1 :].double()
        layer.mlp.forward = plain
        return F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()

    step = 1e-3
    expected = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert gradients[1, :, 2].sum().item() == pytest.approx(expected, rel=2e-2, abs=2e-3)
