"""Reading configs: both dialects, Meta's layout, and the refusal of everything that is not understood."""

import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.published import QWEN3_06B, QWEN3_30B_A3B

from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import lookup
from pop.errors import ConfigError
from pop.models import build
from pop.models.config import (
    ExpertsConfig,
    Gemma3Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3VisionConfig,
    Qwen3VLConfig,
    RopeConfig,
    SiglipConfig,
)

# Llama-3.1-8B-Instruct as published (transformers 4).
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
# What LlamaConfig() of transformers 5.24 writes with every field spelt out, in a smaller size.
TRANSFORMERS5 = {
    "transformers_version": "5.24.0",
    "architectures": None,
    "output_hidden_states": False,
    "return_dict": True,
    "dtype": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 110,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "head_dim": 16,
    "_name_or_path": "",
    "model_type": "llama",
    "output_attentions": False,
}
# The fields without which there is no model; the reference has defaults for all others.
MINIMAL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def read(tmp_path):
    """read(config, name="config.json") writes the object or text into a folder and reads it."""

    def write_and_read(config, name="config.json"):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_config(tmp_path)

    return write_and_read


def test_llama31_as_published(read):
    assert read(LLAMA31_8B) == LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=131072,
        norm_eps=1e-5,
        rope=RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        tie_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype=torch.bfloat16,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_transformers5_dialect(read):
    config = read(TRANSFORMERS5)
    assert config == LlamaConfig(320, 64, 110, 3, 4, 4, 16, bos_id=1, eos_ids=(2,))
    rope = {**LLAMA31_8B["rope_scaling"], "rope_theta": 500000.0}
    new = {k: v for k, v in LLAMA31_8B.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert read({**new, "rope_parameters": rope, "dtype": "bfloat16"}) == read(LLAMA31_8B)


def test_defaults_are_the_references(read):
    config = read(MINIMAL)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (6, 8, 2048)
    assert (config.norm_eps, config.tie_embeddings) == (1e-6, False)
    assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert config.rope == RopeConfig(base=10000.0, kind="default")
    assert (config.dtype, config.bos_id, config.eos_ids) == (torch.float32, None, ())
    nulls = dict.fromkeys(["head_dim", "num_key_value_heads", "rope_scaling", "sliding_window"])
    assert read({**MINIMAL, **nulls}) == config


def test_fields_of_old_configs_that_change_nothing(read):
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    others = {"pretraining_tp": 1, "attention_dropout": 0.1, "pad_token_id": -1, "max_length": 20}
    assert read({**MINIMAL, **smollm2, **others}) == read(MINIMAL)


def test_every_field_reaches_the_config(read):
    changed = {
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1,
        "rope_theta": 300,
        "rope_scaling": {"type": "linear", "factor": 2},
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "torch_dtype": "float16",
        "bos_token_id": 5,
        "eos_token_id": 7,
    }
    rope = RopeConfig(300.0, "linear", 2.0)
    expected = LlamaConfig(100, 48, 80, 3, 6, 2, 10, 77, 1.0, rope, True, True, True, torch.float16, 5, (7,))
    assert read({**MINIMAL, **changed}) == expected
    assert type(expected.rope.base) is type(read({**MINIMAL, **changed}).rope.base) is float


def test_end_tokens_of_generation_config_go_first(read, tmp_path):
    read({**MINIMAL, "eos_token_id": 2})
    assert read({"eos_token_id": [3, 4], "temperature": 0.6}, "generation_config.json").eos_ids == (3, 4)
    assert read({"eos_token_id": 5}, "generation_config.json").eos_ids == (5,)
    assert read({"eos_token_id": None}, "generation_config.json").eos_ids == (2,)
    for wrong in ({"eos_token_id": "3"}, {"eos_token_id": [100]}, {"eos_token_id": [True]}, "[]", "{"):
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read(wrong, "generation_config.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"model_type": "mistral"},
            "must be one of llama, gemma3_text, gemma3, qwen3, qwen3_moe, qwen3_vl, qwen3_vl_moe, not 'mistral'",
        ),
        ({"architectures": ["LlamaModel"]}, r"architectures .* \['LlamaModel'\]"),
        ({"hidden_act": "gelu"}, "hidden_act .* 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp .* 2"),
        ({"pretraining_tp": True}, "pretraining_tp .* True"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor .* 0.5"),
        ({"rope_interleaved": True}, "rope_interleaved .* True"),
        ({"rope_interleaved": 0}, "rope_interleaved .* 0"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type .* 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type .* 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor .* 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast = 32"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor = 2.0"),
        ({"rope_scaling": {"rope_type": "linear", "type": "default"}}, "rope_type is given twice"),
        ({"rope_scaling": [1.0]}, "rope_scaling must be an object"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta .* 10000.0 .* 500000.0"),
        ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"factor": 9}}, "factor is given twice"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16.*bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "dtype .* 'float8_e4m3fn'"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) .* num_key_value_heads \(4\)"),
        ({"num_attention_heads": 5}, "hidden_size 48 .* num_attention_heads 5"),
        ({"head_dim": 9}, r"head_dim \(9\) is odd"),
        ({"hidden_size": 0}, "hidden_size .* 0"),
        ({"hidden_size": -48}, "hidden_size .* -48"),
        ({"hidden_size": 10**12}, "hidden_size .* 1000000000000"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers .* '3'"),
        ({"num_hidden_layers": True}, "num_hidden_layers .* True"),
        ({"vocab_size": 100.0}, "vocab_size .* 100.0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .* '1e-5'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps .* 0"),
        ({"rms_norm_eps": float("nan")}, "NaN"),
        ({"rope_theta": float("inf")}, "Infinity"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings .* 1"),
        ({"eos_token_id": 100}, "eos_token_id .*100"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"a field of tomorrow": 1}, "a field of tomorrow = 1"),
    ],
)
def test_refusals_name_file_field_and_value(read, change, named):
    with pytest.raises(ConfigError, match=rf"config\.json.*{named}"):
        read({**MINIMAL, **change})


@pytest.mark.parametrize("field", list(MINIMAL))
def test_missing_fields_are_named(read, field):
    with pytest.raises(ConfigError, match=f"required field {field} is missing"):
        read({name: value for name, value in MINIMAL.items() if name != field})


@pytest.mark.parametrize("field", [field for field in LLAMA3_ROPE if field != "rope_type"])
def test_llama3_scaling_needs_all_its_fields(read, field):
    assert read({**MINIMAL, "rope_scaling": LLAMA3_ROPE}).rope == RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64)
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        read({**MINIMAL, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != field}})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"a"', "\ufeff{}", "{'a': 1}", "[" * 10**5])
def test_files_that_are_no_json_object(read, text):
    with pytest.raises(ConfigError, match=r"config\.json"):
        read(text)


def test_deep_nesting_is_refused_whether_or_not_it_can_be_parsed(read):
    for depth in range(900, 1000, 3):
        with pytest.raises(ConfigError):
            read(json.dumps(MINIMAL)[:-1] + ', "a": ' + "[" * depth + "]" * depth + "}")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ConfigError, match="neither config"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="not readable"):
        read_config(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError, match="not readable"):
        read_config(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_of_any_field_is_read_or_refused(tmp_path_factory, data):
    whole = {**LLAMA31_8B, "head_dim": 128, "rope_scaling": dict(LLAMA31_8B["rope_scaling"])}
    target = whole["rope_scaling"] if data.draw(st.booleans()) else whole
    for _ in range(data.draw(st.integers(1, 3))):
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(whole))
    try:
        config = read_config(folder)
    except ConfigError:
        return
    assert isinstance(config, LlamaConfig) and config.num_heads % config.num_kv_heads == 0


def test_damaged_text_is_refused_or_reads_as_a_config(tmp_path):
    text = json.dumps(LLAMA31_8B).encode()
    for cut in range(0, len(text), 7):
        (tmp_path / "config.json").write_bytes(text[:cut])
        with pytest.raises(ConfigError):
            read_config(tmp_path)
    for bit in range(0, 8 * len(text), 29):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "config.json").write_bytes(flipped)
        with suppress(ConfigError):  # a flipped digit makes another config: the weights will contradict it
            read_config(tmp_path)


# ---- Meta's params.json ----

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


@pytest.mark.parametrize(("name", "size", "width", "factor"), META)
def test_meta_params_as_published(read, name, size, width, factor):
    config = read(params(*size), "params.json")
    assert (config.intermediate_size, config.rope.factor) == (width, factor)
    assert (config.max_positions, config.bos_id, config.dtype) == (131072, 128000, torch.bfloat16)
    with torch.device("meta"):
        module = build(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == lookup(name).parameters


def test_meta_and_hf_layouts_say_the_same_of_llama31_8b(read, tmp_path):
    meta = read(params(4096, 32, 32, 1024, 1.3), "params.json")
    assert meta == read(LLAMA31_8B)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": -1}, "vocab_size .* -1"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"n_heads": 3}, "dim .* n_heads"),
        ({"n_layers": 5}, "rope_scaling_factor"),
        ({"vision_chunk_size": 448}, "vision_chunk_size = 448"),
        ({"quantization_args": {"group_size": 32}}, "quantization_args"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope .* 'yes'"),
    ],
)
def test_meta_refusals(read, change, named):
    with pytest.raises(ConfigError, match=rf"params\.json.*{named}"):
        read({**params(4096, 32, 32, 1024, 1.3), **change}, "params.json")


def test_meta_without_scaling_and_with_a_factor_of_its_own(read):
    plain = params(64, 2, 8, 32, None, vocab_size=99, n_kv_heads=None, use_scaled_rope=None)
    # 2/3 of 4 * 64 is 170, rounded up to a multiple of 32: 192
    expected = LlamaConfig(99, 64, 192, 2, 8, 8, 8, 8192, 1e-5, RopeConfig(5e5), dtype=torch.bfloat16)
    assert read(plain, "params.json") == expected
    scaled = read(params(64, 2, 8, 32, None, vocab_size=99, rope_scaling_factor=4), "params.json")
    assert scaled.rope == RopeConfig(5e5, "llama3", 4.0, 1.0, 4.0, 8192)


# ---- Gemma-3 ----

LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Gemma-3-1B-it as published (transformers 4).
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
# The text_config of the multimodal sizes, as published: most is left to the defaults of transformers.
EIGHTFOLD = {"factor": 8.0, "rope_type": "linear"}
GEMMA3_TEXTS = {
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": EIGHTFOLD,
        "sliding_window": 1024,
    },
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": EIGHTFOLD,
        "sliding_window": 1024,
    },
    "27b": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": EIGHTFOLD,
        "sliding_window": 1024,
    },
}
GEMMA3_270M = {
    **GEMMA3_1B,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
}
TINY_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL],
}


def parameters(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters, which take no memory."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build(config).named_parameters()}


def count(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_gemma3_1b_as_published(read):
    config = read(GEMMA3_1B)
    assert config == Gemma3Config(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        windows=((512,) * 5 + (None,)) * 4 + (512, 512),
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256.0,
        max_positions=32768,
        norm_eps=1e-6,
        rope=RopeConfig(1e6),
        local_rope=RopeConfig(1e4),
        dtype=torch.bfloat16,
        bos_id=2,
        eos_ids=(1, 106),
    )
    assert (config.num_layers, config.tie_embeddings) == (26, True)


def test_gemma3_of_transformers_5_says_the_same(read):
    """As it writes the config above, layer_types and all."""
    old = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern", "torch_dtype")
    new = {name: value for name, value in GEMMA3_1B.items() if name not in old}
    new["_sliding_window_pattern"] = 6
    new["layer_types"] = [GLOBAL if n % 6 == 0 else LOCAL for n in range(1, 27)]
    new["rope_parameters"] = {
        GLOBAL: {"rope_theta": 1000000, "rope_type": "default"},
        LOCAL: {"rope_theta": 10000, "rope_type": "default"},
    }
    new |= {"dtype": "bfloat16", "tie_word_embeddings": True, "use_bidirectional_attention": False}
    assert read(new) == read(GEMMA3_1B)
    assert read({**new, "sliding_window_pattern": 6}) == read(GEMMA3_1B)


@pytest.mark.parametrize(
    ("size", "heads", "scalar", "layers"),
    [("4b", (8, 4, 256), 256.0, 34), ("12b", (16, 8, 256), 256.0, 48), ("27b", (32, 16, 128), 168.0, 62)],
)
def test_gemma3_text_configs_of_the_multimodal_sizes(read, size, heads, scalar, layers):
    """What they leave out; and the whole model has the registry's parameters, counted here but for the language."""
    config = read(GEMMA3_TEXTS[size])
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == heads
    assert (config.query_pre_attn_scalar, config.num_layers, config.vocab_size) == (scalar, layers, 262208)
    assert config.windows == tuple(None if n % 6 == 0 else 1024 for n in range(1, layers + 1))
    assert (config.rope, config.local_rope) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4))
    assert (config.max_positions, config.norm_eps, config.bos_id, config.eos_ids) == (131072, 1e-6, 2, (1,))
    D, inner, patches = 1152, 4304, 64 * 64
    layer = 2 * 2 * D + 4 * (D * D + D) + (D * inner + inner) + (inner * D + D)  # two norms, attention, MLP
    vision = (3 * 14 * 14 * D + D) + patches * D + 27 * layer + 2 * D
    projector = D * config.hidden_size + D
    assert count(parameters(config)) + vision + projector == lookup(f"gemma3-{size}").parameters


VISION = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}


def gemma3_with_images(text: dict, **fields) -> dict:
    """config.json of a multimodal size, as published."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": VISION,
        **fields,
    }


@pytest.mark.parametrize("size", GEMMA3_TEXTS)
def test_gemma3_with_images_as_published(read, size):
    text = read(GEMMA3_TEXTS[size])
    config = read(gemma3_with_images(GEMMA3_TEXTS[size]))
    vision = SiglipConfig(1152, 4304, 27, 16, 896, 14, 1e-6, 256)
    ids = {"image_id": 262144, "boi_id": 255999, "eoi_id": 256000, "eos_ids": (1, 106)}
    assert config == replace(text, dtype=torch.bfloat16, vision=vision, **ids)
    shapes = parameters(config)
    assert count(shapes) == lookup(f"gemma3-{size}").parameters
    language = {f"language_model.{name}": shape for name, shape in parameters(text).items()}
    assert language.items() <= shapes.items()
    others = shapes.keys() - language.keys()  # tests/models/test_siglip.py has their names
    assert {name.split(".")[0] for name in others} == {"vision_tower", "multi_modal_projector"}


def test_gemma3_with_images_of_transformers_5_says_the_same(read):
    """What it states twice, in the whole and in its parts; and with the ids by their newer names."""
    old = gemma3_with_images(GEMMA3_TEXTS["4b"])
    new = {name: value for name, value in old.items() if name != "torch_dtype"} | {"dtype": "bfloat16"}
    text = {name: value for name, value in GEMMA3_TEXTS["4b"].items() if name != "rope_scaling"}
    text |= {"dtype": "bfloat16", "eos_token_id": 1, "bos_token_id": 2, "_sliding_window_pattern": 6}
    text["layer_types"] = [GLOBAL if n % 6 == 0 else LOCAL for n in range(1, 35)]
    text["rope_parameters"] = {GLOBAL: {"rope_theta": 1e6, **EIGHTFOLD}, LOCAL: {"rope_theta": 1e4}}
    new |= {"text_config": text, "tie_word_embeddings": True}
    new["vision_config"] = VISION | {"dtype": "bfloat16", "layer_norm_eps": 1e-6, "num_channels": 3}
    assert read(new) == read(old)
    for name in ("image", "boi", "eoi"):
        new[f"{name}_token_id"] = new.pop(f"{name}_token_index")
    assert read(new) == read(old)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_config": None}, "model_type is missing|hidden_size is missing"),
        ({"vision_config": None}, "hidden_size is missing"),
        ({"vision_config": 3}, "vision_config must be an object"),
        ({"text_config": {**GEMMA3_TEXTS["4b"], "model_type": "gemma2"}}, "model_type must be 'gemma3_text'"),
        ({"text_config": {**GEMMA3_TEXTS["4b"], "attention_chunk": 3}}, "attention_chunk = 3"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "architectures must be"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings .* False"),
        ({"mm_tokens_per_image": 200}, r"mm_tokens_per_image \(200\)"),
        ({"image_token_index": 262208}, r"image_id \(262208\) is outside of vocab_size 262208"),
        ({"image_token_id": 7}, r"image_token_index \(262144\) and image_token_id \(7\) disagree"),
        ({"audio_config": {}}, "audio_config"),
    ],
)
def test_gemma3_with_images_refusals(read, change, named):
    with pytest.raises(ConfigError, match=rf"config\.json.*({named})"):
        read(gemma3_with_images(GEMMA3_TEXTS["4b"], **change))


@pytest.mark.parametrize(("size", "published"), [("270m", GEMMA3_270M), ("1b", GEMMA3_1B)])
def test_gemma3_text_models_have_the_published_parameters(read, size, published):
    assert count(parameters(read(published))) == lookup(f"gemma3-{size}").parameters


def test_gemma3_tensors_are_the_checkpoints(read):
    """Names and shapes of Gemma-3-1B's file."""
    D, inner, Q, K, E = 1152, 6912, 4 * 256, 256, 256
    layer = {
        "input_layernorm": (D,),
        "mlp.down_proj": (D, inner),
        "mlp.gate_proj": (inner, D),
        "mlp.up_proj": (inner, D),
        "post_attention_layernorm": (D,),
        "post_feedforward_layernorm": (D,),
        "pre_feedforward_layernorm": (D,),
        "self_attn.k_norm": (E,),
        "self_attn.k_proj": (K, D),
        "self_attn.o_proj": (D, Q),
        "self_attn.q_norm": (E,),
        "self_attn.q_proj": (Q, D),
        "self_attn.v_proj": (K, D),
    }
    expected = {"model.embed_tokens.weight": (262144, D), "model.norm.weight": (D,)}
    expected |= {f"model.layers.{n}.{name}.weight": shape for n in range(26) for name, shape in layer.items()}
    assert parameters(read(GEMMA3_1B)) == expected


def test_every_field_reaches_the_gemma3_config(read):
    changed = {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1,
        "query_pre_attn_scalar": 7,
        "rope_theta": 300,
        "rope_scaling": {"type": "linear", "factor": 2},
        "rope_local_base_freq": 30,
        "torch_dtype": "float16",
        "bos_token_id": 5,
        "eos_token_id": 7,
    }
    rope, local = RopeConfig(300.0, "linear", 2.0), RopeConfig(30.0)
    expected = (50, 48, 80, (9, None, None, 9), 6, 2, 10, 7.0, 77, 1.0, rope, local, torch.float16, 5, (7,))
    assert read({**TINY_GEMMA3, **changed}) == Gemma3Config(*expected)
    parameters = {GLOBAL: {"rope_theta": 300, "rope_type": "linear", "factor": 2}, LOCAL: {"rope_theta": 30}}
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    new = {name: value for name, value in changed.items() if name not in old}
    assert read({**TINY_GEMMA3, **new, "rope_parameters": parameters}) == Gemma3Config(*expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, r"architectures .* \['Gemma3ForCond"),
        ({"hidden_activation": "gelu"}, "hidden_activation .* 'gelu'"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"attention_bias": True}, "attention_bias .* True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings .* False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention .* True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"sliding_window": 0}, "sliding_window .* 0"),
        ({"sliding_window_pattern": 2}, r"layer_types and sliding_window_pattern \(2\) disagree"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern .* 0"),
        ({"layer_types": None, "_sliding_window_pattern": 2}, "_sliding_window_pattern = 2"),
        ({"layer_types": [LOCAL] * 3}, "layer_types must be"),
        ({"layer_types": [LOCAL, GLOBAL, LOCAL, "chunked_attention"]}, "layer_types must be"),
        ({"layer_types": [LOCAL, GLOBAL, LOCAL, [1]]}, "layer_types must be"),
        ({"layer_types": LOCAL}, "layer_types must be a list"),
        ({"rope_theta": 1e4, "rope_parameters": {GLOBAL: {"rope_theta": 1e6}}}, "rope_theta .* 10000.0 .* 1000000.0"),
        ({"rope_local_base_freq": 1e4, "rope_parameters": {LOCAL: {"rope_theta": 1e6}}}, "rope_theta .* 10000.0"),
        ({"rope_scaling": EIGHTFOLD, "rope_parameters": {GLOBAL: {"factor": 2.0}}}, "factor is given twice"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta = 1000000.0"),
        ({"rope_parameters": {GLOBAL: 1e6}}, "full_attention must be an object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type .* 'yarn'"),
        ({"mlp_bias": False}, "mlp_bias = False"),
        ({"head_dim": 9}, r"head_dim \(9\) is odd"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) .* num_key_value_heads \(3\)"),
        ({"vocab_size": 2}, r"\[2\] is outside of vocab_size 2"),
    ],
)
def test_gemma3_refusals(read, change, named):
    assert read(TINY_GEMMA3).windows == (9, None, None, 9)
    with pytest.raises(ConfigError, match=rf"config\.json.*{named}"):
        read({**TINY_GEMMA3, **change})


# ---- Qwen3 ----

# Width, MLP, layers, query heads, key-value heads, tied; head width and vocabulary are the same in all.
QWEN3_SIZES = {
    "0.6b": (1024, 3072, 28, 16, 8, True),
    "1.7b": (2048, 6144, 28, 16, 8, True),
    "4b": (2560, 9728, 36, 32, 8, True),
    "8b": (4096, 12288, 36, 32, 8, False),
    "14b": (5120, 17408, 40, 40, 8, False),
    "32b": (5120, 25600, 64, 64, 8, False),
}
TINY_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_qwen3_06b_as_published(read):
    assert read(QWEN3_06B) == Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        max_positions=40960,
        norm_eps=1e-6,
        rope=RopeConfig(1e6),
        tie_embeddings=True,
        dtype=torch.bfloat16,
        bos_id=151643,
        eos_ids=(151645,),
    )


def test_qwen3_of_transformers_5_says_the_same(read):
    old = ("rope_scaling", "rope_theta", "torch_dtype")
    new = {name: value for name, value in QWEN3_06B.items() if name not in old}
    new["rope_parameters"] = {"rope_theta": 1000000, "rope_type": "default"}
    new |= {"dtype": "bfloat16", "layer_types": [GLOBAL] * 28, "sliding_window": 4096}  # a window that is not used
    assert read(new) == read(QWEN3_06B)


@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_qwen3_models_have_the_published_parameters(read, size):
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = read(QWEN3_06B | dict(zip((*fields, "tie_word_embeddings"), QWEN3_SIZES[size], strict=True)))
    assert count(parameters(config)) == lookup(f"qwen3-{size}").parameters


def test_qwen3_tensors_are_the_checkpoints(read):
    """Names and shapes of Qwen3-0.6B's file."""
    D, inner, Q, K, E = 1024, 3072, 16 * 128, 8 * 128, 128
    layer = {
        "input_layernorm": (D,),
        "mlp.down_proj": (D, inner),
        "mlp.gate_proj": (inner, D),
        "mlp.up_proj": (inner, D),
        "post_attention_layernorm": (D,),
        "self_attn.k_norm": (E,),
        "self_attn.k_proj": (K, D),
        "self_attn.o_proj": (D, Q),
        "self_attn.q_norm": (E,),
        "self_attn.q_proj": (Q, D),
        "self_attn.v_proj": (K, D),
    }
    expected = {"model.embed_tokens.weight": (151936, D), "model.norm.weight": (D,)}
    expected |= {f"model.layers.{n}.{name}.weight": shape for n in range(28) for name, shape in layer.items()}
    assert parameters(read(QWEN3_06B)) == expected
    assert parameters(read({**QWEN3_06B, "tie_word_embeddings": False})) == expected | {"lm_head.weight": (151936, D)}


def test_every_field_reaches_the_qwen3_config(read):
    changed = {
        "head_dim": 10,
        "max_position_embeddings": 77,
        "rms_norm_eps": 1,
        "rope_theta": 300,
        "rope_scaling": {"type": "linear", "factor": 2},
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": 5,
        "eos_token_id": [7, 8],
    }
    rope = RopeConfig(300.0, "linear", 2.0)
    expected = (50, 48, 80, 3, 4, 2, 10, 77, 1.0, rope, True, torch.float16, 5, (7, 8))
    assert read({**TINY_QWEN3, **changed}) == Qwen3Config(*expected)
    assert read(TINY_QWEN3) == Qwen3Config(50, 48, 80, 3, 4, 2)  # what it leaves out has the reference's defaults
    assert Qwen3Config(50, 48, 80, 3, 4, 2) == Qwen3Config(50, 48, 80, 3, 4, 2, 128, 32768, 1e-6, RopeConfig(1e4))


QWEN3_235B_A22B = QWEN3_30B_A3B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_window_layers": 94,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}


@pytest.mark.parametrize(("size", "fields"), [("30b-a3b", QWEN3_30B_A3B), ("235b-a22b", QWEN3_235B_A22B)])
def test_qwen3_mixtures_as_published(read, size, fields):
    config = read(fields)
    layers, width = fields["num_hidden_layers"], fields["moe_intermediate_size"]
    assert config.experts == ExpertsConfig(128, 8, width, tuple(range(layers)), normalised=True)
    found = parameters(config)
    assert count(found) == lookup(f"qwen3-{size}").parameters
    D = fields["hidden_size"]
    shapes = {
        "gate.weight": (128, D),
        "experts.gate_up_proj": (128, 2 * width, D),
        "experts.down_proj": (128, D, width),
    }
    expected = {f"model.layers.{n}.mlp.{name}": shape for n in range(layers) for name, shape in shapes.items()}
    assert {name: shape for name, shape in found.items() if ".mlp." in name} == expected


def test_which_layers_have_experts(read):
    def layers(**fields):
        return read(QWEN3_30B_A3B | {"num_hidden_layers": 6} | fields).experts.layers

    assert layers(mlp_only_layers=[0, 4]) == (1, 2, 3, 5)
    assert layers(decoder_sparse_step=2) == (1, 3, 5)
    assert layers(decoder_sparse_step=2, mlp_only_layers=[3]) == (1, 5)
    saved = read(QWEN3_30B_A3B | {"num_experts": None, "num_local_experts": 9, "norm_topk_prob": None})
    assert (saved.experts.count, saved.experts.normalised) == (9, False)  # the reference's default


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": None}, "num_experts and num_local_experts are both missing"),
        ({"num_local_experts": 64}, "num_experts and num_local_experts disagree"),
        ({"num_experts_per_tok": 129}, r"num_experts_per_tok \(129\) exceeds num_experts \(128\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ({"mlp_only_layers": [1.5]}, "mlp_only_layers must be a list of layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
        ({"shared_expert_intermediate_size": 5}, "shared_expert_intermediate_size = 5"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"architectures .* \['Qwen3ForCausalLM'\]"),
    ],
)
def test_refusals_of_mixtures(read, change, named):
    with pytest.raises(ConfigError, match=named):
        read(QWEN3_30B_A3B | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["Qwen3Model"]}, r"architectures .* \['Qwen3Model'\]"),
        ({"hidden_act": "gelu"}, "hidden_act .* 'gelu'"),
        ({"attention_bias": True}, "attention_bias .* True"),
        ({"use_sliding_window": True, "sliding_window": 9}, "use_sliding_window .* True"),
        ({"sliding_window": "all"}, "sliding_window must be an integer"),
        ({"layer_types": [GLOBAL, LOCAL, GLOBAL]}, "layer_types must be .* 'sliding_attention'"),
        ({"layer_types": [GLOBAL] * 4}, "layer_types must be"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) .* num_key_value_heads \(3\)"),
        ({"head_dim": 9}, r"head_dim \(9\) is odd"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type .* 'yarn'"),
        ({"mlp_bias": False}, "mlp_bias = False"),
        ({"num_experts": 128}, "num_experts = 128"),
    ],
)
def test_qwen3_refusals(read, change, named):
    with pytest.raises(ConfigError, match=named):
        read({**TINY_QWEN3, **change})


# ---- Qwen3-VL ----

# Qwen3-VL-8B-Instruct as published (transformers 4).
QWEN3_VL_8B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4304,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def changed(config: dict, change: dict) -> dict:
    """The config with some fields replaced, those of its parts by their path: {"text_config.hidden_size": 1}."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for path, value in change.items():
        *part, name = path.split(".")
        (config[part[0]] if part else config)[name] = value
    return config


def test_qwen3_vl_8b_as_published(read):
    assert read(QWEN3_VL_8B) == Qwen3VLConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=262144,
        norm_eps=1e-6,
        rope=RopeConfig(5e6),
        tie_embeddings=False,
        dtype=torch.bfloat16,
        bos_id=151643,
        eos_ids=(151645,),
        mrope_sections=(24, 20, 20),
        vision=Qwen3VisionConfig(1152, 4304, 27, 16, 4096, (8, 16, 24), 48, 16, 2, 2, 1e4),
        image_id=151655,
        video_id=151656,
    )


def test_qwen3_vl_30b_a3b_as_published(read):
    experts = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
               "num_experts": 128, "num_experts_per_tok": 8}  # fmt: skip
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4}
    text = {"model_type": "qwen3_vl_moe_text"} | sizes | experts
    change = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    change |= {"vision_config.model_type": "qwen3_vl_moe", "vision_config.out_hidden_size": 2048}
    change |= {f"text_config.{name}": value for name, value in text.items()}
    config = read(changed(QWEN3_VL_8B, change))
    assert config.experts == ExpertsConfig(128, 8, 768, tuple(range(48)), normalised=True)
    assert count(parameters(config)) == lookup("qwen3-vl-30b-a3b").parameters
    assert read(changed(QWEN3_VL_8B, change | {"text_config.tie_word_embeddings": True})) == config
    with pytest.raises(ConfigError, match="norm_topk_prob must be True"):
        read(changed(QWEN3_VL_8B, change | {"text_config.norm_topk_prob": False}))
    with pytest.raises(ConfigError, match="num_experts = 128"):
        read(changed(QWEN3_VL_8B, {"text_config.num_experts": 128}))


def test_qwen3_vl_of_transformers_5_says_the_same(read):
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default", "rope_theta": 5000000}
    new = {
        "text_config.rope_parameters": rope,
        "text_config.rope_scaling": None,
        "text_config.rope_theta": None,
        "text_config.pad_token_id": None,
        "vision_config.model_type": "qwen3_vl_vision",
        "vision_config.rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
        "dtype": "bfloat16",
    }
    assert read(changed(QWEN3_VL_8B, new)) == read(QWEN3_VL_8B)


def test_every_field_reaches_the_qwen3_vl_config(read):
    config = read(
        changed(
            QWEN3_VL_8B,
            {
                "tie_word_embeddings": True,
                "text_config.tie_word_embeddings": True,
                "image_token_id": 5,
                "video_token_id": 6,
                "vision_start_token_id": 8,
                "vision_end_token_id": 9,
                "eos_token_id": [7],
                "text_config.rope_scaling": {"mrope_section": [30, 14, 20]},
                "vision_config.num_position_embeddings": 100,
                "vision_config.patch_size": 14,
                "vision_config.spatial_merge_size": 3,
                "vision_config.temporal_patch_size": 4,
                "vision_config.deepstack_visual_indexes": [],
                "vision_config.rope_parameters": {"rope_theta": 50.0},
            },
        )
    )
    assert (config.tie_embeddings, config.image_id, config.video_id, config.eos_ids) == (True, 5, 6, (7,))
    assert (config.start_id, config.end_id) == (8, 9)
    assert config.mrope_sections == (30, 14, 20)
    assert config.vision == Qwen3VisionConfig(1152, 4304, 27, 16, 4096, (), 10, 14, 3, 4, 50.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures must be"),
        ({"text_config": None}, "is missing"),
        ({"text_config": 3}, "text_config must be an object"),
        ({"vision_config": None}, "num_heads|is missing"),
        ({"text_config.dtype": "float16", "dtype": "bfloat16"}, r"dtype \(bfloat16\) and dtype \(float16\) disagree"),
        ({"text_config.model_type": "qwen3"}, "model_type must be 'qwen3_vl_text'"),
        ({"text_config.tie_word_embeddings": True}, "tie_word_embeddings is False, but the opposite in text_config"),
        ({"text_config.attention_bias": True}, "attention_bias must be"),
        ({"text_config.num_experts": 8}, "num_experts = 8"),
        ({"text_config.rope_scaling": None}, "mrope_section is missing"),
        ({"text_config.rope_scaling": {"mrope_section": [24, 20]}}, "mrope_section must be three numbers"),
        ({"text_config.rope_scaling": {"mrope_section": [24, 20, 21]}}, "does not add up to half of head_dim"),
        ({"text_config.rope_scaling": {"mrope_section": [84, -20, 0]}}, "mrope_section must be three numbers"),
        (
            {"text_config.rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": False}},
            "mrope_interleaved must be True",
        ),
        ({"text_config.rope_parameters": {"mrope_section": [20, 24, 20]}}, "mrope_section is given twice"),
        ({"image_token_id": 151936}, r"\[151936, 151656, 151652, 151653\] must be four tokens below vocab_size 151936"),
        ({"image_token_id": 151656}, "must be four tokens"),
        ({"vision_end_token_id": 151652}, "must be four tokens"),
        ({"vision_config.out_hidden_size": 4095}, r"out_hidden_size \(4095\) .* hidden_size \(4096\)"),
        ({"vision_config.num_heads": 17}, r"hidden_size \(1152\) over num_heads \(17\)"),
        ({"vision_config.num_heads": 64}, r"over num_heads \(64\) is no multiple of 4"),
        ({"vision_config.deepstack_visual_indexes": [8, 27]}, "layers from 0 to 26"),
        ({"vision_config.deepstack_visual_indexes": [16, 8]}, "each later than the one before"),
        ({"vision_config.deepstack_visual_indexes": "8"}, "deepstack_visual_indexes must be a list"),
        ({"text_config.num_hidden_layers": 2}, "names 3 layers, but the language model has 2"),
        ({"vision_config.num_position_embeddings": 2305}, r"num_position_embeddings \(2305\) is not a square"),
        ({"vision_config.hidden_act": "silu"}, "hidden_act must be"),
        ({"vision_config.in_channels": 1}, "in_channels must be 3"),
        ({"vision_config.model_type": "qwen2_5_vl"}, "model_type must be one of qwen3_vl_vision"),
        ({"vision_config.window_size": 112}, "window_size = 112"),
        ({"vision_config.rope_parameters": {"rope_type": "default"}}, "rope_type must be 'axial'"),
        ({"rope_theta": 1e6}, "rope_theta = 1000000.0"),
    ],
)
def test_qwen3_vl_refusals(read, change, named):
    with pytest.raises(ConfigError, match=named):
        read(changed(QWEN3_VL_8B, change))
