"""LoRA adapters: the merged model is that of W + s B A, and what is more than plain LoRA is refused by name."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import (
    random_model,
    tiny_config,
    tiny_gemma3_vl_config,
    tiny_qwen3_config,
    tiny_qwen3_vl_config,
    write_checkpoint,
)

import pop
from pop.backends.tensor_parallel import Part
from pop.checkpoints.adapters import merge_adapter, read_adapter
from pop.checkpoints.weights import load_weights
from pop.errors import CheckpointError, ConfigError

# As PEFT 0.21 saves a config, all its fields that are off left out.
CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "somebody/base",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_alpha": 6,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "r": 3,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "target_modules": ["q_proj", "down_proj"],
    "layers_to_transform": [1, 2],
}
TARGETS = ("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.2.self_attn.q_proj", "layers.2.mlp.down_proj")


def write_adapter(folder, module, ranks=(3, 3, 3, 3), prefix="model.", names=TARGETS, change=None, **fields):
    """Save an adapter of random numbers for layers of a module. Returns its A and B by the layers' names."""
    generator = torch.Generator().manual_seed(7)
    pairs, tensors = {}, {}
    linears = dict(module.named_modules())
    for name, rank in zip(names, ranks, strict=True):
        (found,) = (linear for path, linear in linears.items() if is_of_decoder(path, name))
        out, width = found.weight.shape
        pairs[name] = [torch.randn(shape, generator=generator) / 3 for shape in ((rank, width), (out, rank))]
        for kind, tensor in zip("AB", pairs[name], strict=True):
            tensors[f"base_model.model.{prefix}{name}.lora_{kind}.weight"] = tensor.clone()
    if change is not None:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return pairs


def is_of_decoder(path, name):
    return f".{path}".endswith(f".{name}") and "vision" not in path


def merged(module, pairs, scales):
    """The module with s B A added to each layer's matrix, in float64."""
    for (name, (a, b)), scale in zip(pairs.items(), scales, strict=True):
        (weight,) = (weight for path, weight in module.named_parameters() if is_of_decoder(path, f"{name}.weight"))
        weight.data = (weight.double() + scale * b.double() @ a.double()).to(weight.dtype)
    return module


@pytest.fixture
def base(tmp_path):
    return write_checkpoint(tmp_path / "base", seed=4)


@pytest.mark.parametrize(
    ("ranks", "fields", "scales"),
    [
        ((3, 3, 3, 3), {}, (2, 2, 2, 2)),
        ((3, 3, 3, 3), {"use_rslora": True}, (6 / math.sqrt(3),) * 4),
        ((3, 3, 3, 3), {"lora_alpha": 1.5, "init_lora_weights": "gaussian"}, (0.5,) * 4),
        ((3, 5, 2, 5), {"rank_pattern": {"2.self_attn.q_proj": 2, "down_proj": 5}}, (2, 6 / 5, 3, 6 / 5)),
        ((3, 3, 3, 3), {"alpha_pattern": {"layers.1.mlp.down_proj": 9, "down_proj": 12, "proj": 3}}, (2, 3, 2, 4)),
    ],
)
def test_the_merged_model_is_that_of_w_plus_s_b_a(base, tmp_path, ranks, fields, scales):
    module = random_model(tiny_config(), seed=4)
    pairs = write_adapter(tmp_path / "adapter", module, ranks, **fields)
    expected = merged(module, pairs, scales)
    model = pop.load(base, adapter=str(tmp_path / "adapter"))
    for (name, found), (_, wanted) in zip(model.module.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(model.logits([[1, 2, 3]]), expected(torch.tensor([[1, 2, 3]])), rtol=1e-4, atol=1e-5)
    assert model.fingerprint != pop.load(base).fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(tmp_path, dtype):
    base = write_checkpoint(tmp_path / "base", seed=4, dtype=dtype)
    before = pop.load(base)
    pairs = write_adapter(tmp_path / "adapter", before.module)
    model = pop.load(base, adapter=tmp_path / "adapter")
    expected = merged(before.module, pairs, (2,) * 4)
    assert model.dtype == dtype
    for found, wanted in zip(model.module.parameters(), expected.parameters(), strict=True):
        # float32 sums may round to the other neighbour where a float64 sum lies halfway
        assert (found != wanted).float().mean() < (1 if dtype == torch.float32 else 0.01)
        torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (tiny_qwen3_config(), "model."),
        (tiny_gemma3_vl_config(), "model.language_model."),  # as transformers 5 names the layers
        (tiny_gemma3_vl_config(), "language_model.model."),  # and 4
        (tiny_qwen3_vl_config(), "model.language_model."),
    ],
)
def test_every_family_under_the_names_of_the_reference(tmp_path, config, prefix):
    whole = random_model(config, seed=1)
    pairs = write_adapter(tmp_path, whole, prefix=prefix)
    adapter = read_adapter(tmp_path, whole, {})
    assert len(adapter) == 4
    expected = merged(random_model(config, seed=1), pairs, (2,) * 4)
    merge_adapter(adapter, whole, {})
    for found, wanted in zip(whole.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_head_is_merged_into_its_matrix_in_the_adapter(base, tmp_path, ranks):
    """PEFT stores the base model's head with the adapter of a head, since it may have been resized or trained."""
    config, sizes = tiny_config(vocab_size=68), {"dtype": torch.float32, "device": "cpu", "progress": False}
    base = write_checkpoint(tmp_path / "head", seed=4, vocab_size=68)
    head = torch.randn(68, 30, generator=torch.Generator().manual_seed(1))
    change = lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": head})  # noqa: E731
    module = random_model(config, seed=4)
    ((a, b),) = write_adapter(tmp_path / "adapter", module, [3], "", ["lm_head"], change=change).values()
    expected = head + 2 * b @ a
    for rank in range(ranks):
        part = Part(config, rank, ranks)
        found, cut = part.build(), lambda whole, part=part: part.shards["lm_head.weight"].cut(whole)
        adapter = read_adapter(tmp_path / "adapter", found, part.shards)
        load_weights(base, found, shards=part.shards, **sizes)
        merge_adapter(adapter, found, part.shards)
        torch.testing.assert_close(found.lm_head.weight.data, cut(expected), rtol=1e-6, atol=1e-6)


def test_a_tied_head_takes_no_adapter(tmp_path):
    base = write_checkpoint(tmp_path / "base", tie_embeddings=True)
    write_adapter(tmp_path / "adapter", random_model(tiny_config()), [3], "", ["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head.lora_A.weight is not .* \(its head is its embedding: tie_"):
        pop.load(base, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_of_several_processes_are_those_of_the_merged_model(base, tmp_path, ranks):
    config = tiny_config(num_heads=4, num_kv_heads=2)
    base = write_checkpoint(tmp_path / "more", seed=4, num_heads=4, num_kv_heads=2)
    names = [f"layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")]
    names += [f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    pairs = write_adapter(tmp_path / "adapter", random_model(config), [3] * 7, names=names)
    weights = load_file(base / "model.safetensors")
    for name, (a, b) in pairs.items():
        weights[f"model.{name}.weight"] += 2 * b @ a
    (tmp_path / "merged").mkdir()
    save_file(weights, tmp_path / "merged/model.safetensors")
    options = {"dtype": torch.float32, "device": "cpu", "progress": False}
    for rank in range(ranks):
        part = Part(config, rank, ranks)
        found, expected = part.build(), part.build()
        adapter = read_adapter(tmp_path / "adapter", found, part.shards)
        load_weights(base, found, shards=part.shards, **options)
        merge_adapter(adapter, found, part.shards)
        load_weights(tmp_path / "merged", expected, shards=part.shards, **options)
        for one, other in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_int8_rounds_the_merged_weights(tmp_path):
    pytest.importorskip("torchao")
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2}
    base = write_checkpoint(tmp_path / "base", seed=4, **wide)
    module = random_model(tiny_config(**wide), seed=4)
    pairs = write_adapter(tmp_path / "adapter", module)
    model = pop.load(base, adapter=tmp_path / "adapter", quantize="int8")
    expected = merged(module, pairs, (2,) * 4).layers[1].mlp.down_proj.weight
    error = (model.module.layers[1].mlp.down_proj.weight - expected).abs().amax(1)
    assert (error <= expected.abs().amax(1) / 250).all()


# ---- Refusals


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', not 'IA3'"),
        ({"bias": "lora_only"}, "bias must be 'none', not 'lora_only'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = [1]"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters = ['experts.down_proj']"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]]"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens = [5]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"a field of tomorrow": {"x": 1}}, "a field of tomorrow = {'x': 1}"),
        ({"lora_alpha": -1}, "lora_alpha must be"),
        ({"alpha_pattern": {"q_proj": "9"}}, "alpha_pattern.q_proj must be"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern has (a+)+$"),
        ({"alpha_pattern": [2]}, "alpha_pattern must be an object"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(base, tmp_path, fields, said, monkeypatch):
    monkeypatch.setattr("pop.loading.load_weights", lambda *args, **kwargs: pytest.fail("weights were read"))
    write_adapter(tmp_path / "adapter", random_model(tiny_config()), **fields)
    with pytest.raises(ConfigError) as caught:
        pop.load(base, adapter=tmp_path / "adapter")
    assert "adapter_config.json: " in str(caught.value) and said in str(caught.value)


MODEL = "base_model.model.model"
Q = f"{MODEL}.layers.1.self_attn.q_proj"
POINTER = "version https://git-lfs.github.com/spec/v1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(3)}),
            "lora_magnitude_vector is not of",
        ),
        (lambda t: t.update({f"{Q}.bias": torch.zeros(3)}), "q_proj.bias is not of a linear layer"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(3)}), "lm_head.weight is not of"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3)}),
            "embedding_A is",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(3)}),
            "layers.9.",
        ),
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "lora_B.weight comes without its lora_A"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lora_A.weight comes without its lora_B"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 2)}), "lora_A.weight is [3, 2], not [3, 30]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(2, 30)}), "lora_B.weight is [60, 3], not [60, 2]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(3, 3)}), "lora_B.weight is [3, 3], not"),
        (lambda t: t[f"{Q}.lora_B.weight"].fill_(math.nan), "lora_B.weight does not hold finite"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 30, dtype=torch.int8)}), "does not hold finite"),
        (lambda t: t.clear(), "it is empty"),
        (lambda t: t.update({"\x1b[2J": torch.zeros(3)}), "\\x1b[2J is not of"),
    ],
)
def test_every_tensor_must_be_of_a_linear_layer(base, tmp_path, change, said):
    write_adapter(tmp_path / "adapter", random_model(tiny_config()), change=change)
    with pytest.raises(CheckpointError) as caught:
        pop.load(base, adapter=tmp_path / "adapter")
    assert "adapter_model.safetensors" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), ConfigError, "adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), CheckpointError, "fetch the adapter again"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), CheckpointError, "fetch the adapter"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1"
            ),
            *(CheckpointError, "pointers of Git LFS"),
        ),
    ],
)
def test_a_broken_adapter(base, tmp_path, spoil, error, said):
    write_adapter(tmp_path / "adapter", random_model(tiny_config()))
    spoil(tmp_path / "adapter")
    with pytest.raises(error, match=said):
        pop.load(base, adapter=tmp_path / "adapter")


def test_an_adapter_is_a_folder(base):
    with pytest.raises(pop.InputError, match="adapter is 5"):
        pop.load(base, adapter=5)
