"""LoRA adapters: the merged model is that of W + s B A, and what is more than plain LoRA is refused by name."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import TARGETS, is_of_decoder, write_adapter
from support.goldens import REFUSED
from support.tiny import (
    random_model,
    shard,
    tiny_config,
    tiny_gemma3_vl_config,
    tiny_qwen3_config,
    tiny_qwen3_vl_config,
    write_checkpoint,
)

import pop
from pop.checkpoints.weights import published_name
from pop.errors import CheckpointError, ConfigError, PopError
from tools.convert import convert
from tools.convert.lora import read_adapter


def merged(module, pairs, scales):
    """The module with s B A added to each layer's matrix, in float64."""
    for (name, (a, b)), scale in zip(pairs.items(), scales, strict=True):
        (weight,) = (weight for path, weight in module.named_parameters() if is_of_decoder(path, f"{name}.weight"))
        weight.data = (weight.double() + scale * b.double() @ a.double()).to(weight.dtype)
    return module


@pytest.fixture
def base(tmp_path):
    """The folder of a base model, for which the folder "adapter" holds an adapter."""
    write_adapter(tmp_path / "adapter", random_model(tiny_config()))
    return write_checkpoint(tmp_path / "base", seed=4)


def merge(base, tmp_path):
    """Merge the folder "adapter" into a base model, and return the new checkpoint."""
    return convert(base, tmp_path / "merged", tmp_path / "adapter", progress=False)


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
    model = pop.load(merge(base, tmp_path))
    for (name, found), (_, wanted) in zip(model.module.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(model.logits([[1, 2, 3]]), expected(torch.tensor([[1, 2, 3]])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(tmp_path, dtype):
    base = write_checkpoint(tmp_path / "base", seed=4, dtype=dtype)
    before = pop.load(base)
    pairs = write_adapter(tmp_path / "adapter", before.module)
    model = pop.load(merge(base, tmp_path))
    expected = merged(before.module, pairs, (2,) * 4)
    assert model.dtype == dtype
    for found, wanted in zip(model.module.parameters(), expected.parameters(), strict=True):
        # float32 sums may round to the other neighbour where a float64 sum lies halfway
        assert (found != wanted).float().mean() < 0.01
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
    module = random_model(config, seed=1)
    pairs = write_adapter(tmp_path, module, prefix=prefix)
    parameters = {published_name(name): parameter for name, parameter in module.named_parameters()}
    updates = read_adapter(tmp_path, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    assert len(updates) == 4
    expected = merged(random_model(config, seed=1), pairs, (2,) * 4)
    for name, update in updates.items():
        parameters[name].data = update.merged(parameters[name])
    for found, wanted in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_sum_that_overflows_is_refused(tmp_path):
    """The factors are finite numbers, but float16 cannot hold their product. Nothing is written."""
    base = write_checkpoint(tmp_path / "base", seed=4, dtype=torch.float16)
    write_adapter(tmp_path / "adapter", random_model(tiny_config()))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1000 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"overflows torch\.float16"):
        merge(base, tmp_path)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_in_a_pickle_is_refused_with_advice(base, tmp_path):
    folder = tmp_path / "adapter"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="holds a pickle, adapter_model.bin; save the adapter with PEFT"):
        merge(base, tmp_path)


def test_the_other_files_and_the_shards_are_those_of_the_base_model(base, tmp_path):
    """Weights that the index does not name are not the model's."""
    weights = load_file(base / "model.safetensors")
    weight_map = shard(base, 2)
    files = {*weight_map.values()}
    save_file(weights, base / "consolidated.safetensors")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "third.plan").write_text("of the base model's weights")
    folder = merge(base, tmp_path)
    names = {*files, "config.json", "model.safetensors.index.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    found = {file: load_file(folder / file) for file in files}
    assert {name: file for file in files for name in found[file]} == weight_map
    changed = {name for name, file in weight_map.items() if not torch.equal(found[file][name], weights[name])}
    assert changed == {f"model.{name}.weight" for name in TARGETS}
    assert pop.load(folder).logits([[1, 2]]).isfinite().all()


def write_head_adapter(tmp_path, **changed):
    """Replace the adapter by one of the head. Returns its A and B."""
    change = lambda tensors: tensors.update(changed)  # noqa: E731
    pairs = write_adapter(tmp_path / "adapter", random_model(tiny_config()), [3], "", ["lm_head"], change=change)
    return pairs["lm_head"]


def test_a_head_is_merged_into_its_matrix_in_the_adapter(base, tmp_path):
    """PEFT stores the base model's head with the adapter of a head, since it may have been resized or trained."""
    head = torch.randn(67, 30, generator=torch.Generator().manual_seed(1))
    a, b = write_head_adapter(tmp_path, **{"base_model.model.lm_head.base_layer.weight": head})
    found = load_file(merge(base, tmp_path) / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(found, head + 2 * b @ a, rtol=1e-6, atol=1e-6)


def test_a_tied_head_takes_no_adapter(tmp_path):
    base = write_checkpoint(tmp_path / "base", tie_embeddings=True)
    write_head_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head.lora_A.weight is not .* \(its head is its embedding: tie_"):
        merge(base, tmp_path)


# ---- Refusals


@pytest.mark.parametrize(("field", "value"), REFUSED["fields of adapter_config.json"])
def test_what_is_not_plain_lora_is_refused_by_name(base, tmp_path, field, value):
    write_adapter(tmp_path / "adapter", random_model(tiny_config()), **{field: value})
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: .*{field}"):
        merge(base, tmp_path)
    assert not (tmp_path / "merged").exists()


WEIGHTS = "adapter/adapter_model.safetensors"
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (A.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(3), "lora_magnitude_vector is not of"),
        (A.replace("layers.1", "layers.9"), torch.zeros(3), "layers.9."),
        ("\x1b[2J", torch.zeros(3), "\\x1b[2J is not of"),
        (A, None, "lora_B.weight comes without its lora_A"),
        (B, None, "lora_A.weight comes without its lora_B"),
        (A, torch.zeros(3, 2), "lora_A.weight is [3, 2], not [3, 30]"),
        (A, torch.zeros(2, 30), "lora_B.weight is [60, 3], not [60, 2]"),
        (B, torch.zeros(3, 3), "lora_B.weight is [3, 3], not"),
        (B, torch.full((60, 3), math.nan), "lora_B.weight does not hold finite"),
        (A, torch.zeros(3, 30, dtype=torch.int8), "does not hold finite"),
        (None, None, "it is empty"),
    ],
)
def test_every_tensor_must_be_of_a_linear_layer(base, tmp_path, name, tensor, said):
    file = tmp_path / WEIGHTS
    tensors = load_file(file) if name else {}
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        merge(base, tmp_path)
    assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "fetch it again"),
        ("x", "fetch it again"),
        ("version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    ],
)
def test_weights_that_lack_or_are_broken(base, tmp_path, content, said):
    (tmp_path / WEIGHTS).unlink()
    if content:
        (tmp_path / WEIGHTS).write_text(content)
    with pytest.raises(PopError, match=said):
        merge(base, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
