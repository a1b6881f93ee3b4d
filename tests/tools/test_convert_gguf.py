"""Converting GGUF files: tiny ones, written by the package `gguf`, become checkpoints that `pop` reads."""

import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.goldens import REFUSED
from support.nightly import NIGHTLY

import pop
from pop.checkpoints.config_json import read_config
from pop.errors import CheckpointError, MissingExtra, PopError, UnsupportedError
from pop.models.config import RopeConfig
from tools.convert import convert

gguf = pytest.importorskip("gguf")

from support.gguf_files import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    LLAMA_KEYS,
    MLP,
    VOCAB,
    WIDTH,
    Q,
    bpe_keys,
    converted,
    make_tensors,
    many_tokens,
    sentencepiece_keys,
    write_gguf,
)

# ---- weights


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_1, Q.Q4_K, Q.Q6_K])
def test_tensor_types(tmp_path, kind):
    """Every value is what `gguf` dequantises, in bfloat16."""
    tensors = make_tensors(width=256, quantised=kind)
    _, weights = converted(tmp_path, tensors, {"llama.embedding_length": 256})
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }
    assert tensors["token_embd.weight"][1] == kind
    for hf_name, name in names.items():
        expected = torch.from_numpy(gguf.quants.dequantize(*tensors[name]).copy()).bfloat16()
        assert expected.std() > 0 and torch.equal(weights[hf_name], expected), name


def test_rotary_pairs(tmp_path):
    """GGUF's rows under llama.cpp's rotation of neighbours give the dot products that HF's rows give under
    the rotation of halves: weights and biases, and fewer key-value than query heads."""
    tensors = make_tensors(biases=True, quantised=Q.BF16)
    _, weights = converted(tmp_path, tensors)
    torch.manual_seed(0)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    angles = torch.arange(7)[:, None] * 10.0 ** -torch.arange(HEAD_DIM // 2)  # [T, E/2]
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)

    def scores(weights_of, first, second):
        heads = []
        for name, count in (("q", HEADS), ("k", KV_HEADS)):
            weight, bias = weights_of(name)
            states = (x @ weight.double().T + bias.double()).view(7, count, HEAD_DIM).transpose(0, 1)
            pairs = torch.complex(states[..., first], states[..., second]) * turn
            heads.append(pairs.repeat_interleave(HEADS // count, dim=0))
        return (heads[0] @ heads[1].mH).real  # [H, T, T]: sums over pairs of the dot products of rotated pairs

    def from_gguf(name):
        weight = torch.from_numpy(gguf.quants.dequantize(*tensors[f"blk.1.attn_{name}.weight"]).copy())
        return weight, torch.from_numpy(tensors[f"blk.1.attn_{name}.bias"][0]).bfloat16()

    def from_hf(name):
        return [weights[f"model.layers.1.self_attn.{name}_proj.{kind}"] for kind in ("weight", "bias")]

    half = HEAD_DIM // 2
    neighbours = scores(from_gguf, slice(0, None, 2), slice(1, None, 2))
    halves = scores(from_hf, slice(0, half), slice(half, None))
    torch.testing.assert_close(halves, neighbours, rtol=1e-10, atol=1e-10)


def test_gemma3(tmp_path):
    """Norms lose the 1 that GGUF adds; nothing is permuted; the config is that of the text model."""
    tensors = make_tensors("gemma3")
    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    config, weights = converted(tmp_path, tensors, keys, "gemma3")
    norms = {
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.attn_q_norm": "model.layers.1.self_attn.q_norm",
        "blk.1.attn_k_norm": "model.layers.1.self_attn.k_norm",
        "blk.1.post_attention_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_norm": "model.layers.1.pre_feedforward_layernorm",
        "blk.1.post_ffw_norm": "model.layers.1.post_feedforward_layernorm",
        "output_norm": "model.norm",
    }
    matrices = {f"blk.0.attn_{name}": f"model.layers.0.self_attn.{name}_proj" for name in "qk"}
    for name, hf_name in (norms | matrices).items():
        offset = 1 if name in norms else 0
        expected = (torch.from_numpy(tensors[f"{name}.weight"][0]) - offset).bfloat16()
        assert torch.equal(weights[f"{hf_name}.weight"], expected), name
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert config["query_pre_attn_scalar"] == HEAD_DIM
    model = pop.load(tmp_path / "model", dtype=torch.float32)
    assert model.config.windows == (16, 16)
    assert (model.config.rope, model.config.local_rope) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4))
    assert model.logits([[1, 2, 3]]).isfinite().all()


def test_the_largest_gemma3_scales_scores_by_its_width(tmp_path):
    """A file does not state the scale. That of 27B, and of no smaller model, is width / heads."""
    tensors, layers = make_tensors("gemma3"), 62
    for n in range(LAYERS, layers):
        tensors |= {name.replace("blk.0.", f"blk.{n}."): one for name, one in tensors.items() if "blk.0." in name}
    config, _ = converted(tmp_path, tensors, {"gemma3.block_count": layers}, "gemma3")
    assert config["query_pre_attn_scalar"] == WIDTH // HEADS != HEAD_DIM


# ---- config.json


@pytest.mark.parametrize("tied", [True, False])
def test_config(tmp_path, tied):
    tensors = make_tensors(biases=True, tied=tied)
    ids = {f"tokenizer.ggml.{name}_token_id": i for name, i in {"bos": 0, "eos": 4, "eot": 2, "eom": 4}.items()}
    config, weights = converted(tmp_path, tensors, ids)
    assert config["rms_norm_eps"] == 1e-5  # GGUF stores float32, which is 9.999999747378752e-06
    read = read_config(tmp_path / "model")
    assert (read.vocab_size, read.hidden_size, read.intermediate_size) == (VOCAB, WIDTH, MLP)
    assert (read.num_heads, read.num_kv_heads, read.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (read.num_layers, read.max_positions, read.rope) == (LAYERS, 512, RopeConfig(500000.0))
    assert (read.attention_bias, read.mlp_bias, read.tie_embeddings) == (True, True, tied)
    assert (read.dtype, read.bos_id, read.eos_ids) == (torch.bfloat16, 0, (4, 2))
    if tied:
        assert "lm_head.weight" not in weights
    else:
        assert torch.equal(weights["lm_head.weight"], torch.from_numpy(tensors["output.weight"][0]).bfloat16())


def llama3_divisors(factor, low, high, original=8192, base=500000.0):
    """One frequency at a time, as the wavelengths of the Llama-3.1 paper's code are told apart."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * base ** (i / HEAD_DIM)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("keys", "divided_by", "expected"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, None, RopeConfig(5e5, "linear", 4.0)),
        ({"scale_linear": 4.0}, None, RopeConfig(5e5, "linear", 4.0)),  # the older key
        ({}, 8.0, RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
        ({}, 32.0, RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, 8192)),
    ],
)
def test_scaled_rope(tmp_path, keys, divided_by, expected):
    tensors = make_tensors()
    if divided_by:
        divisors = llama3_divisors(divided_by, 1, 4)
        assert len(set(divisors.tolist())) > 2  # one of the interpolated kind is among them
        tensors["rope_freqs.weight"] = (divisors, Q.F32)
    converted(tmp_path, tensors, {f"llama.rope.{key}": value for key, value in keys.items()})
    assert read_config(tmp_path / "model").rope == expected


# ---- files that are refused
NORM = "output_norm.weight"
NAN_NORM = np.where(np.arange(WIDTH) == 3, np.nan, 1).astype(np.float32)
MANY = many_tokens()
UNSUPPORTED = [  # changed keys; changed tensors, None for one that lacks; what the error says
    ({"llama.rope.freq_base": 0.0}, {"rope_freqs.weight": (np.full(12, 8, np.float32), Q.F32)}, "RoPE"),
    ({}, {"rope_freqs.weight": (llama3_divisors(8.0, 1, 8), Q.F32)}, "rope_freqs.weight"),
    (bpe_keys("viking"), MANY, "viking"),
    ({}, {NORM: (np.zeros(64), Q.F64)}, "F64"),
]
UNSOUND = [
    ({}, {"blk.1.attn_k.weight": None}, "blk.1.attn_k.weight"),
    ({}, {"token_embd.weight": None}, "vocab_size"),
    ({}, {"blk.0.attn_sub_norm.weight": (np.ones(1, np.float32), Q.F32)}, "attn_sub_norm"),
    ({}, {"blk.0.attn_q.bias": (np.zeros(96, np.float32), Q.F32)}, "blk.0.attn_k.bias"),  # half of the biases
    ({}, {NORM: (NAN_NORM, Q.F32)}, NORM),
    (bpe_keys(bos_id=None), {}, "tokens must be at most 50"),
    (bpe_keys() | {"tokenizer.ggml.eos_token_id": 999}, MANY, "999"),
    (bpe_keys() | {"tokenizer.ggml.token_type": [1]}, MANY, "token_type"),
    (sentencepiece_keys() | {"tokenizer.ggml.token_type": [1] * 269}, MANY, "unk"),  # no unknown piece
]
CASES = [(UnsupportedError, *case) for case in UNSUPPORTED] + [(CheckpointError, *case) for case in UNSOUND]
for error, name in ((UnsupportedError, "not supported"), (CheckpointError, "wrong")):
    CASES += [(error, keys, {}, words) for keys, words in REFUSED[f"keys of GGUF files that are {name}"]]


@pytest.mark.parametrize(("error", "keys", "changed", "words"), CASES, ids=lambda value: str(value)[:20])
def test_refused_by_name(tmp_path, error, keys, changed, words):
    tensors = make_tensors() | changed
    with pytest.raises(error) as info:
        converted(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, keys)
    assert words in str(info.value) and "m.gguf" in str(info.value) and "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: write_gguf(file, {}, {}, "mamba"), "mamba"),
        (lambda file: write_gguf(file, make_tensors(), LLAMA_KEYS, endianess=gguf.GGUFEndian.BIG), "big-endian"),
        (lambda file: file.touch(), "not a sound GGUF file"),
        (lambda file: file.write_text("no GGUF file at all"), "not a sound GGUF file"),
    ],
)
def test_other_files_are_refused(tmp_path, make, words):
    make(tmp_path / "m.gguf")
    with pytest.raises(PopError, match=words):
        convert(tmp_path / "m.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("package", [None, SimpleNamespace(MODEL_ARCH={"LLAMA": 1})], ids=["absent", "old"])
def test_the_package_gguf_is_named_where_it_lacks(tmp_path, monkeypatch, package):
    file = write_gguf(tmp_path / "m.gguf", make_tensors(), LLAMA_KEYS)
    monkeypatch.setitem(sys.modules, "gguf", package)
    with pytest.raises(MissingExtra, match=r"pip install 'pop-prefill\[demo\]'"):
        convert(file, tmp_path / "model")


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    """The bytes of a file that can be converted, which the tests below damage."""
    folder = tmp_path_factory.mktemp("gguf")
    data = write_gguf(folder / "m.gguf", many_tokens(), LLAMA_KEYS | bpe_keys()).read_bytes()
    assert convert_bytes(data, folder)
    return data


def convert_bytes(data, folder):
    """Convert `data`; whether it worked. If not, nothing is left and the error is one of ours."""
    (folder / "m.gguf").write_bytes(data)
    try:
        convert(folder / "m.gguf", folder / "model", progress=False)
    except PopError:
        assert [path.name for path in folder.iterdir()] == ["m.gguf"]
        return False
    return (folder / "model/model.safetensors").is_file()


@given(st.data())
def test_damaged(tmp_path_factory, sound_file, data):
    """Cut anywhere, it is refused. A flip in a weight's code cannot be seen; others end in an error or a folder."""
    length = data.draw(st.integers(0, len(sound_file) - 1) | st.integers(0, 8000))  # the metadata more often
    assert not convert_bytes(sound_file[:length], tmp_path_factory.mktemp("cut"))
    changed = bytearray(sound_file)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, 12000))] ^= 1 << data.draw(st.integers(0, 7))
    convert_bytes(bytes(changed), tmp_path_factory.mktemp("flipped"))


ARRAYS = (b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_type")
KEYS = ("tensors", "metadata", b"general.architecture", *ARRAYS, b"output_norm.weight", b"general.last")
ABSURD = (2**60, 2**64 - 1, 2**40, 10**6)
EACH_ONCE = [(key, ABSURD[number % 4]) for number, key in enumerate(KEYS)]


@pytest.mark.parametrize(("key", "size"), [*itertools.product(KEYS, ABSURD)] if NIGHTLY else EACH_ONCE, ids=str)
def test_absurd_sizes(tmp_path, sound_file, key, size):
    """A length or count in the header claims far more than the file holds."""
    whole = sound_file
    if key == b"general.last":  # an array of single bytes as the file's last thing
        whole = write_gguf(tmp_path / "m.gguf", {}, LLAMA_KEYS | {"general.last": [True, False]}).read_bytes()
    if key in ("tensors", "metadata"):
        at = {"tensors": 8, "metadata": 16}[key]
    else:
        # after a key: u32 type, then a string's length; or, of an array, u32 item type and u64 count
        # after a tensor's name: u32 number of dimensions, then each as u64
        at = whole.index(key) + len(key) + (8 if key in (*ARRAYS, b"general.last") else 4)
    assert not convert_bytes(whole[:at] + size.to_bytes(8, "little") + whole[at + 8 :], tmp_path)
