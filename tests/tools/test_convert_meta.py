"""Meta's layout: params.json, the weights in consolidated.NN.pth, and tokenizer.model."""

import json
import pickle
import re
import zipfile
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.goldens import REFUSED
from support.meta_files import from_meta, meta_name, write_meta
from support.published import PUBLISHED
from support.text import GOLDENS, assert_golden, golden_tokenizer, spec_of

from pop.checkpoints.config_json import read_config
from pop.errors import CheckpointError, ConfigError, TokenizerError
from pop.inputs.chat import chat_format
from pop.inputs.tokenizers import load_tokenizer
from pop.models.config import LlamaConfig, RopeConfig
from tools.convert import convert, meta
from tools.convert.checkpoint import write_config
from tools.convert.meta_tokenizer import write_tokenizer

# ---- params.json ----

SIZES = {  # as published: the sizes that `params` takes
    "llama3.1-8b": (4096, 32, 32, 1024, 1.3),
    "llama3.1-70b": (8192, 80, 64, 4096, 1.3),
    "llama3.1-405b": (16384, 126, 128, 4096, 1.2),
    "llama3.2-1b": (2048, 16, 32, 256, 1.5),
    "llama3.2-3b": (3072, 28, 24, 256, 1.0),
}


def params(*sizes, **change):
    names = ("dim", "n_layers", "n_heads", "multiple_of", "ffn_dim_multiplier")
    others = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True}
    return dict(zip(names, sizes, strict=True)) | others | change


@pytest.fixture
def read(tmp_path):
    """read(fields) writes params.json, converts it to config.json, and reads that."""

    def write_and_read(fields):
        (tmp_path / "params.json").write_text(json.dumps(fields), encoding="utf-8")
        config = meta.read_fields(tmp_path / "params.json", meta.read_params, None)
        write_config(config, tmp_path)
        return read_config(tmp_path)

    return write_and_read


@pytest.mark.parametrize("name", SIZES)
def test_params_are_the_config_that_is_published(read, tmp_path, name):
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text(json.dumps(PUBLISHED[name]))
    assert read(params(*SIZES[name])) == read_config(tmp_path / "published")


@pytest.mark.parametrize(("change", "named"), REFUSED["params.json"])
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


# ---- Weights ----


def converted(tmp_path):
    """Convert the folder "meta", and return the weights by name."""
    folder = convert(tmp_path / "meta", tmp_path / "model", progress=False)
    return load_file(folder / "model.safetensors")


def refused(tmp_path, pattern):
    """Check that the conversion raises a short CheckpointError and makes no folder."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        converted(tmp_path)
    assert not (tmp_path / "model").exists()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500


@pytest.mark.parametrize("ranks", [1, 2])
def test_metas_files_hold_the_same_weights(tmp_path, ranks):
    """In Q and K, pairs of rows become the two halves of a head. test_convert_gguf.py has the scores that they give."""
    _, weights = from_meta(tmp_path / "meta", ranks)
    loaded = converted(tmp_path)
    assert {meta_name(name) for name in loaded} == weights.keys()
    for name, found in loaded.items():
        expected = weights[meta_name(name)].bfloat16()
        if "q_proj" in name or "k_proj" in name:
            expected = expected.unflatten(0, (-1, 5, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(found, expected), name


# ---- tokenizer.model ----


def test_the_files_of_a_converted_folder(tmp_path):
    from_meta(tmp_path / "meta")
    converted(tmp_path)
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == weights
    single_bytes = b"".join(b"%s %d\n" % (b64encode(bytes([n])), n) for n in range(256))
    (tmp_path / "meta/tokenizer.model").write_bytes(single_bytes)
    folder = convert(tmp_path / "meta", tmp_path / "chats", progress=False)
    assert {path.name for path in folder.iterdir()} == weights | {"tokenizer.json", "tokenizer_config.json"}
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "Hi"}]
    assert chat_format(tokenizer).encode(messages) == chat_format(tokenizer, choice="llama-3.1").encode(messages)


def test_metas_tokenizer_gives_the_same_ids(tmp_path):
    """tokenizer.model lists the same tokens in the same order."""
    llama = golden_tokenizer("llama-3.1")
    size = len(spec_of("llama-3.1")["model"]["vocab"])
    lines = [b"%s %d" % (b64encode(llama.token_bytes(id)), id) for id in range(size)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    write_tokenizer(tmp_path / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.special_tokens) == 256 and tokenizer.vocab_size == size + 256
    assert tokenizer.bos_id == size and tokenizer.special_tokens["<|reserved_special_token_247|>"] == size + 255
    assert llama.special_tokens.items() <= tokenizer.special_tokens.items()
    assert tokenizer.template_variables == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    assert_golden(tokenizer, json.loads((GOLDENS / "llama-3.1/golden.json").read_bytes()))


@pytest.mark.parametrize("content", [b"", b"AAAA 0", b"IQ== 0\nIQ== 1\n", b"IQ== x", b"!!!! 0", b"IQ==", b"\xff\xfe 1"])
def test_a_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path))):
        write_tokenizer(tmp_path / "tokenizer.model", tmp_path)


def test_metas_tied_head_and_old_tables(tmp_path, monkeypatch):
    """A published shape of Llama-3.2 ties its head, which some files repeat."""
    config, weights = from_meta(tmp_path / "meta", tie_embeddings=True)
    monkeypatch.setitem(meta.FACTORS, (config.hidden_size, config.num_layers), meta.LLAMA32_FACTOR)
    for extra in ({"rope.freqs": torch.ones(5)}, {"output.weight": weights["tok_embeddings.weight"]}):
        write_meta(tmp_path / "meta", {**weights, **extra}, 2)
        convert(tmp_path / "meta", tmp_path / next(iter(extra)), progress=False)
    write_meta(tmp_path / "meta", {**weights, "output.weight": -weights["tok_embeddings.weight"]}, 2)
    refused(tmp_path, r"output\.weight should repeat tok_embeddings\.weight")


def test_metas_ranks_must_belong_together(tmp_path):
    folder = tmp_path / "meta"
    _, weights = from_meta(folder, 2)
    write_meta(tmp_path, {**weights, "norm.weight": weights["norm.weight"] + 1}, 2)
    (tmp_path / "consolidated.01.pth").replace(folder / "consolidated.01.pth")
    refused(tmp_path, r"model\.norm\.weight should be the same in all files")
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    refused(tmp_path, r"no consolidated\.01\.pth")
    (folder / "consolidated.02.pth").unlink()
    refused(tmp_path, r"embed_tokens\.weight is \[34, 60\], not \[68, 60\].* 1 files consolidated.*\.pth")
    (folder / "consolidated.00.pth").unlink()
    refused(tmp_path, r"no weights, such as consolidated\.00\.pth")


class Bomb:
    """Its pickle makes a file in the current folder when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


ONES = torch.ones(60)
NORM, WQ, W1 = "norm.weight", "layers.0.attention.wq.weight", "layers.2.feed_forward.w1.weight"
ODD = "dense tensors|wrong dtype|more than tensors"  # the last since torch 2.15


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (NORM, None, r"missing: model\.norm\.weight"),
        ("layers.1.attention.wk.bias", ONES, r"surplus: layers\.1\.att"),
        (W1, torch.ones(44, 60, dtype=torch.int32), r"of a wrong dtype: model\.layers\.2\.mlp\.gate_proj\.weight"),
        *[(WQ, torch.ones(s), rf"q_proj\.weight is \{list(s)}, not \[60, 60\]") for s in ((), (60,), (60, 60, 1))],
        (WQ, torch.ones(59, 60), r"q_proj\.weight is \[59, 60\], not \[60, 60\]"),
        (NORM, Bomb(), r"consolidated\.00\.pth.*more than tensors"),
        (NORM, 3, "truncated or corrupt|are not those"),
        (3, torch.ones(3), "truncated or corrupt|are not those"),
        *[(NORM, odd, ODD) for odd in (ONES.to("meta"), ONES.to_sparse(), ONES.to(torch.complex64))],
        (NORM, "nested", ODD),
        (NORM, torch.ones(1).expand(60), None),
    ],
)
def test_each_weight_is_checked(tmp_path, monkeypatch, name, value, said):
    _, weights = from_meta(tmp_path / "meta")
    weights.pop(name, None)
    if value is not None:
        weights[name] = torch.nested.as_nested_tensor([ONES]) if isinstance(value, str) else value
    torch.save(weights, tmp_path / "meta/consolidated.00.pth")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    if said is None:
        assert converted(tmp_path)["model.norm.weight"].is_contiguous()
    else:
        refused(tmp_path, said)
    assert not Path("executed").exists()


@pytest.mark.parametrize("value", [Bomb(), [], 3, None, torch.ones(3)], ids=lambda value: type(value).__name__)
def test_files_of_something_else_are_refused(tmp_path, monkeypatch, value):
    """Saved by torch, and as a bare pickle."""
    from_meta(tmp_path / "meta")
    file = tmp_path / "meta/consolidated.00.pth"
    monkeypatch.chdir(tmp_path)
    torch.save(value, file)
    refused(tmp_path, r"consolidated\.00\.pth.*(more than tensors|truncated or corrupt|are not those)")
    file.write_bytes(pickle.dumps(value))
    refused(tmp_path, r"consolidated\.00\.pth.*corrupt")
    assert not Path("executed").exists()


def test_a_compressed_archive_is_refused(tmp_path):
    from_meta(tmp_path / "meta")
    file = tmp_path / "meta/consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(tmp_path, "wrong checksum or compressed")


@given(st.data())
def test_a_cut_or_a_flipped_bit_in_metas_files_never_changes_a_weight(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    from_meta(folder, num_layers=1)
    file = folder / "consolidated.00.pth"
    expected = {name: tensor.clone() for name, tensor in meta.load(file).items()}
    whole = file.read_bytes()
    central = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 4)
    for _ in range(10):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError, match="corrupt"):
            meta.load(file)
        start = data.draw(st.sampled_from([0, central]))
        bit = data.draw(st.integers(8 * start, 8 * len(whole) - 1))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            loaded = meta.load(file)
        except CheckpointError:
            continue
        assert loaded.keys() == expected.keys()  # a bit that means nothing, such as the date of an entry
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
