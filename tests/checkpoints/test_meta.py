"""Meta's layout: params.json, and the weights in consolidated.NN.pth."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.meta_files import assert_same, from_meta, load, meta_name, meta_weights, refused, shell, write_meta
from support.published import LLAMA31_8B
from support.tiny import tiny_config

from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import lookup
from pop.checkpoints.weights import load_weights
from pop.errors import CheckpointError, ConfigError
from pop.models import build
from pop.models.config import LlamaConfig, RopeConfig

# ---- params.json ----

# As published: the arguments of `params` below; the MLP width and RoPE factor of the HF layout's config.json.
META = [
    ("llama3.1-8b", (4096, 32, 32, 1024, 1.3), 14336, 8.0),
    ("llama3.1-70b", (8192, 80, 64, 4096, 1.3), 28672, 8.0),
    ("llama3.1-405b", (16384, 126, 128, 4096, 1.2), 53248, 8.0),
    ("llama3.2-1b", (2048, 16, 32, 256, 1.5), 8192, 32.0),
    ("llama3.2-3b", (3072, 28, 24, 256, 1.0), 8192, 32.0),
]


def params(dim, n_layers, n_heads, multiple_of, ffn_dim_multiplier, **change):
    return {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": ffn_dim_multiplier,
        "multiple_of": multiple_of,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        **change,
    }


@pytest.fixture
def read(tmp_path):
    """read(fields) writes params.json into a folder and reads it."""

    def write_and_read(fields, name="params.json"):
        (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
        return read_config(tmp_path)

    return write_and_read


@pytest.mark.parametrize(("name", "size", "width", "factor"), META)
def test_params_as_published(read, name, size, width, factor):
    config = read(params(*size))
    assert (config.intermediate_size, config.rope.factor) == (width, factor)
    assert (config.max_positions, config.bos_id, config.dtype) == (131072, 128000, torch.bfloat16)
    with torch.device("meta"):
        module = build(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == lookup(name).parameters


def test_both_layouts_say_the_same_of_llama31_8b(read):
    assert read(params(4096, 32, 32, 1024, 1.3)) == read(LLAMA31_8B, "config.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": -1}, "vocab_size .* -1"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rope_theta": None}, "rope_theta"),
        ({"n_heads": 3}, "dim .* n_heads"),
        ({"n_layers": 5}, "rope_scaling_factor"),
        ({"vision_chunk_size": 448}, "vision_chunk_size = 448"),
        ({"a field of tomorrow": False}, "a field of tomorrow = False"),  # all of Meta's fields are sizes
        ({"quantization_args": {"group_size": 32}}, "quantization_args"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope .* 'yes'"),
    ],
)
def test_refusals_name_file_field_and_value(read, change, named):
    with pytest.raises(ConfigError, match=rf"params\.json.*{named}"):
        read({**params(4096, 32, 32, 1024, 1.3), **change})


def test_params_without_scaling_and_with_a_factor_of_its_own(read):
    plain = params(64, 2, 8, 32, None, vocab_size=99, n_kv_heads=None, use_scaled_rope=None)
    # 2/3 of 4 * 64 is 170, rounded up to a multiple of 32: 192
    expected = LlamaConfig(99, 64, 192, 2, 8, 8, 8, 8192, 1e-5, RopeConfig(5e5), dtype=torch.bfloat16)
    assert read(plain) == expected
    scaled = read(params(64, 2, 8, 32, None, vocab_size=99, rope_scaling_factor=4))
    assert scaled.rope == RopeConfig(5e5, "llama3", 4.0, 1.0, 4.0, 8192)


# ---- weights ----


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("vocab_size", [68, 20_012])  # the larger is copied in slices
def test_metas_files_hold_the_same_weights(tmp_path, ranks, vocab_size):
    config, weights = from_meta(tmp_path, ranks, vocab_size=vocab_size)
    loaded = load(tmp_path, config=config)
    assert {meta_name(name) for name in loaded} == weights.keys()
    for name, parameter in loaded.items():
        assert parameter.is_contiguous() and not parameter.requires_grad
        expected = weights[meta_name(name)]
        if "q_proj" in name or "k_proj" in name:  # a head's rows in another order
            parameter, expected = (w.unflatten(0, (-1, 10)).sort(1).values for w in (parameter, expected))
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_attention_scores_are_the_same(tmp_path, ranks):
    """Meta's code turns neighbouring values of a head, as complex numbers; ours turns the two halves."""
    config, weights = from_meta(tmp_path, ranks)
    module = shell(config)
    load_weights(tmp_path, module, dtype=torch.float32, device="cpu", progress=False)
    T, E = 9, config.head_dim
    x = torch.randn(1, T, config.hidden_size, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(0, E, 2) / E))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, E/2]

    def rotated(weight):
        pairs = torch.view_as_complex((x[0] @ weight.T).view(T, -1, E // 2, 2))  # [T, heads, E/2]
        return torch.view_as_real(pairs * turns).flatten(2)

    attention = module.model.layers[1].self_attn
    rope = module.rope(torch.arange(T)[None])[None]
    q, k = attention.queries(x, rope)[0], attention.keys_values(x, rope)[0][0]
    expected_q, expected_k = (rotated(weights[f"layers.1.attention.{w}.weight"]) for w in ("wq", "wk"))
    for head in range(config.num_heads):
        group = head // (config.num_heads // config.num_kv_heads)
        scores, expected = q[:, head] @ k[:, group].T, expected_q[:, head] @ expected_k[:, group].T
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_metas_params_and_weights_together(tmp_path):
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 67, "multiple_of": 32}
    (tmp_path / "params.json").write_text(json.dumps({**params, "rope_theta": 500000.0}))
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "head_dim": 8, "intermediate_size": 192}
    write_meta(tmp_path, meta_weights(tiny_config(**sizes)))
    assert len(load(tmp_path)) == 2 * 9 + 3


def test_metas_tied_head_and_old_tables(tmp_path):
    config, weights = from_meta(tmp_path, tie_embeddings=True)
    write_meta(tmp_path, {**weights, "rope.freqs": torch.ones(5)}, 2)
    load(tmp_path, config=config)
    write_meta(tmp_path, {**weights, "output.weight": weights["tok_embeddings.weight"]}, 2)
    load(tmp_path, config=config)
    write_meta(tmp_path, {**weights, "output.weight": -weights["tok_embeddings.weight"]}, 2)
    refused(tmp_path, r"output\.weight.*model\.embed_tokens\.weight", config=config)


def test_metas_ranks_must_belong_together(tmp_path):
    config, weights = from_meta(tmp_path, 2)
    other = {**weights, "norm.weight": weights["norm.weight"] + 1}
    write_meta(tmp_path / "..", other, 2)
    (tmp_path / "../consolidated.01.pth").replace(tmp_path / "consolidated.01.pth")
    refused(tmp_path, r"consolidated\.01\.pth: norm\.weight.*model\.norm\.weight", config=config)
    (tmp_path / "consolidated.01.pth").rename(tmp_path / "consolidated.02.pth")
    refused(tmp_path, r"no consolidated\.01\.pth", config=config)
    (tmp_path / "consolidated.02.pth").unlink()
    message = refused(tmp_path, r"embed_tokens\.weight is \[34, 60\], not \[68, 60\]", config=config)
    assert "there are 1 files consolidated.*.pth, perhaps not all" in message
    write_meta(tmp_path, weights, 4)  # two KV heads over four ranks: half a head for each
    refused(tmp_path, r"k_proj\.weight is \[5, 60\] \+ \[5, 60\]", config=config)


def test_metas_names_and_shapes_are_checked(tmp_path):
    config, weights = from_meta(tmp_path)
    weights["layers.0.attention.wq.weight"] = torch.tensor(1.0)
    weights["layers.1.attention.wk.bias"] = torch.ones(20)
    weights["layers.2.feed_forward.w1.weight"] = weights["layers.2.feed_forward.w1.weight"].to(torch.int32)
    del weights["norm.weight"]
    torch.save(weights, tmp_path / "consolidated.00.pth")
    message = refused(tmp_path, r"missing: model\.norm\.weight; surplus: layers\.1\.att", config=config)
    assert "gate_proj.weight (torch.int32)" in message and "q_proj.weight is [], not [60, 60]" in message


def test_pickles_are_data_only(tmp_path):
    config, weights = from_meta(tmp_path)
    witness = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (witness,)

    for bomb in (Bomb(), {**weights, "norm.weight": Bomb()}):
        torch.save(bomb, tmp_path / "consolidated.00.pth")
        refused(tmp_path, r"consolidated\.00\.pth.*more than tensors", config=config)
        (tmp_path / "consolidated.00.pth").write_bytes(pickle.dumps(bomb))
        refused(tmp_path, r"consolidated\.00\.pth.*corrupt", config=config)
    assert not witness.exists()


@pytest.mark.parametrize("value", [[], 3, None, torch.ones(3), {"norm.weight": 3}, {3: torch.ones(3)}])
def test_pickles_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "consolidated.00.pth")
    refused(tmp_path, "truncated or corrupt|are not those", config=tiny_config())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_storage_or_layout(tmp_path):
    config, weights = from_meta(tmp_path)
    ones = torch.ones(60)
    nested = torch.nested.as_nested_tensor([ones])
    for odd in (ones.to("meta"), ones.to_sparse(), nested, ones.to(torch.complex64)):
        torch.save({**weights, "norm.weight": odd}, tmp_path / "consolidated.00.pth")
        refused(tmp_path, "dense tensors|complex64|more than tensors", config=config)  # the last since torch 2.15
    expanded = {**weights, "norm.weight": torch.ones(1).expand(60)}
    torch.save(expanded, tmp_path / "consolidated.00.pth")
    assert load(tmp_path, config=config)["model.norm.weight"].is_contiguous()


def test_a_compressed_archive_is_not_mapped_as_weights(tmp_path):
    config, _ = from_meta(tmp_path)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(tmp_path, "wrong checksum or compressed", config=config)


def test_truncated_pickles(tmp_path):
    config, _ = from_meta(tmp_path, num_layers=1)
    whole = (tmp_path / "consolidated.00.pth").read_bytes()
    for cut in [*range(0, len(whole), 997), *range(len(whole) - 40, len(whole))]:
        (tmp_path / "consolidated.00.pth").write_bytes(whole[:cut])
        refused(tmp_path, r"consolidated\.00\.pth.*corrupt", config=config)


@given(st.data())
def test_a_flipped_bit_in_metas_files_never_changes_a_weight(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    config, _ = from_meta(folder, num_layers=1)
    expected = load(folder, config=config)
    whole = (folder / "consolidated.00.pth").read_bytes()
    central = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 4)
    for _ in range(10):
        start = data.draw(st.sampled_from([0, central]))
        bit = data.draw(st.integers(8 * start, 8 * len(whole) - 1))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "consolidated.00.pth").write_bytes(flipped)
        try:
            loaded = load(folder, config=config)
        except CheckpointError:
            continue
        assert_same(loaded, expected)  # a bit that means nothing, such as the date of an entry
