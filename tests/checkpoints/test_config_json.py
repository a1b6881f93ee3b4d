"""Reading config.json: the published files, both dialects of transformers, every field, every refusal."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.published import (
    EIGHTFOLD,
    GEMMA3_1B,
    GEMMA3_TEXTS,
    LLAMA31_8B,
    OLMO2_7B,
    QWEN3_06B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
    QWEN3_VL_8B,
    SIGLIP,
    gemma3_with_images,
)

from pop.checkpoints.config_json import read_config
from pop.errors import ConfigError
from pop.models.config import (
    ExpertsConfig,
    Gemma3Config,
    LlamaConfig,
    Olmo2Config,
    Qwen3Config,
    Qwen3VisionConfig,
    Qwen3VLConfig,
    RopeConfig,
    SiglipConfig,
)

LOCAL, GLOBAL = "sliding_attention", "full_attention"
# Only the fields that have no default in the reference.
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
TINY_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL],
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
GEMMA3_4B = gemma3_with_images(GEMMA3_TEXTS["4b"])
# The config of Qwen3-VL-30B-A3B, as far as it differs from the 8B's.
EXPERTS = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config.model_type": "qwen3_vl_moe_text",
    "text_config.hidden_size": 2048,
    "text_config.intermediate_size": 6144,
    "text_config.num_hidden_layers": 48,
    "text_config.num_key_value_heads": 4,
    "text_config.decoder_sparse_step": 1,
    "text_config.mlp_only_layers": [],
    "text_config.moe_intermediate_size": 768,
    "text_config.norm_topk_prob": True,
    "text_config.num_experts": 128,
    "text_config.num_experts_per_tok": 8,
    "vision_config.model_type": "qwen3_vl_moe",
    "vision_config.out_hidden_size": 2048,
}


def changed(config: dict, change: dict) -> dict:
    """The config with some fields replaced, those of its parts by their path: {"text_config.hidden_size": 1}."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for path, value in change.items():
        part, _, name = path.rpartition(".")
        if part in config:
            config[part][name] = value
        else:
            config[path] = value
    return config


QWEN3_VL_30B_A3B = changed(QWEN3_VL_8B, EXPERTS)


@pytest.fixture
def read(tmp_path):
    """read(config, name="config.json") writes the object or text into a folder and reads it."""

    def write_and_read(config, name="config.json"):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_config(tmp_path)

    return write_and_read


# ---- published files ----

VISION = SiglipConfig(1152, 4304, 27, 16, 896, 14, 1e-6, 256)
TOWER = Qwen3VisionConfig(1152, 4304, 27, 16, 4096, (8, 16, 24), 48, 16, 2, 2, 1e4)
QWEN3_VL = {"mrope_sections": (24, 20, 20), "image_id": 151655, "video_id": 151656, "dtype": torch.bfloat16}
QWEN3_VL |= {"start_id": 151652, "end_id": 151653, "bos_id": 151643, "eos_ids": (151645,)}
# By name: the file, and the config that it describes. The sizes are in the order of Llama's.
PUBLISHED = {
    "llama3.1-8b": (
        LLAMA31_8B,
        LlamaConfig(
            *(128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5),
            *(RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), False, torch.bfloat16),
            bos_id=128000,
            eos_ids=(128001, 128008, 128009),
        ),
    ),
    "gemma3-1b": (
        GEMMA3_1B,
        Gemma3Config(
            *(262144, 1152, 6912, ((512,) * 5 + (None,)) * 4 + (512, 512), 4, 1, 256, 256.0, 32768, 1e-6),
            rope=RopeConfig(1e6),
            local_rope=RopeConfig(1e4),
            dtype=torch.bfloat16,
            bos_id=2,
            eos_ids=(1, 106),
        ),
    ),
    "qwen3-0.6b": (
        QWEN3_06B,
        Qwen3Config(
            *(151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, RopeConfig(1e6), True, torch.bfloat16),
            bos_id=151643,
            eos_ids=(151645,),
        ),
    ),
    "olmo2-7b": (
        OLMO2_7B,
        Olmo2Config(
            *(100352, 4096, 11008, 32, 32, 32, 128, 4096, 1e-6, RopeConfig(5e5), False, torch.bfloat16),
            bos_id=100257,
            eos_ids=(100257,),
        ),
    ),
    "qwen3-vl-8b": (
        QWEN3_VL_8B,
        Qwen3VLConfig(
            151936, 4096, 12288, 36, 32, 8, 128, 262144, 1e-6, RopeConfig(5e6), False, vision=TOWER, **QWEN3_VL
        ),
    ),
    "qwen3-vl-30b-a3b": (
        QWEN3_VL_30B_A3B,
        Qwen3VLConfig(
            *(151936, 2048, 6144, 48, 32, 4, 128, 262144, 1e-6, RopeConfig(5e6), False),
            experts=ExpertsConfig(128, 8, 768, tuple(range(48)), normalised=True),
            vision=replace(TOWER, out_size=2048),
            **QWEN3_VL,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(read, name):
    file, config = PUBLISHED[name]
    assert read(file) == config
    assert repr(read(file)) == repr(config)  # a fingerprint hashes it, so types matter


@pytest.mark.parametrize(
    ("size", "heads", "scalar", "layers"),
    [("4b", (8, 4, 256), 256.0, 34), ("12b", (16, 8, 256), 256.0, 48), ("27b", (32, 16, 128), 168.0, 62)],
)
def test_gemma3_text_configs_of_the_multimodal_sizes(read, size, heads, scalar, layers):
    """The published files leave out the defaults of the reference."""
    config = read(GEMMA3_TEXTS[size])
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == heads
    assert (config.query_pre_attn_scalar, config.num_layers, config.vocab_size) == (scalar, layers, 262208)
    assert config.windows == tuple(None if n % 6 == 0 else 1024 for n in range(1, layers + 1))
    assert (config.rope, config.local_rope) == (RopeConfig(1e6, "linear", 8.0), RopeConfig(1e4))
    assert (config.max_positions, config.norm_eps, config.bos_id, config.eos_ids) == (131072, 1e-6, 2, (1,))


@pytest.mark.parametrize("size", GEMMA3_TEXTS)
def test_gemma3_with_images_is_its_text_model_and_a_tower(read, size):
    text = read(GEMMA3_TEXTS[size])
    config = read(gemma3_with_images(GEMMA3_TEXTS[size]))
    ids = {"image_id": 262144, "boi_id": 255999, "eoi_id": 256000, "eos_ids": (1, 106)}
    assert config == replace(text, dtype=torch.bfloat16, vision=VISION, **ids)


@pytest.mark.parametrize("file", [QWEN3_30B_A3B, QWEN3_235B_A22B], ids=["30b-a3b", "235b-a22b"])
def test_qwen3_mixtures_as_published(read, file):
    config = read(file)
    layers, width = file["num_hidden_layers"], file["moe_intermediate_size"]
    assert config.experts == ExpertsConfig(128, 8, width, tuple(range(layers)), normalised=True)


def test_which_layers_have_experts(read):
    def layers(**fields):
        return read(QWEN3_30B_A3B | {"num_hidden_layers": 6} | fields).experts.layers

    assert layers(mlp_only_layers=[0, 4]) == (1, 2, 3, 5)
    assert layers(decoder_sparse_step=2) == (1, 3, 5)
    assert layers(decoder_sparse_step=2, mlp_only_layers=[3]) == (1, 5)
    saved = read(QWEN3_30B_A3B | {"num_experts": None, "num_local_experts": 9, "norm_topk_prob": None})
    assert (saved.experts.count, saved.experts.normalised) == (9, False)  # the reference's default


# ---- transformers 5 ----


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


GEMMA3_LAYERS = [GLOBAL if n % 6 == 0 else LOCAL for n in range(1, 35)]
GEMMA3_ROPES = {GLOBAL: {"rope_theta": 1000000, "rope_type": "default"}, LOCAL: {"rope_theta": 10000}}
# By family: a config of transformers 4, and fields of transformers 5 that say the same. None removes a field.
SAME = {
    "llama": (
        LLAMA31_8B,
        {
            **dict.fromkeys(["rope_scaling", "rope_theta", "torch_dtype"]),
            "rope_parameters": {**LLAMA31_8B["rope_scaling"], "rope_theta": 500000.0},
            "dtype": "bfloat16",
        },
    ),
    "gemma3": (
        GEMMA3_1B,
        {
            **dict.fromkeys(["rope_local_base_freq", "rope_scaling", "rope_theta", "torch_dtype"]),
            "sliding_window_pattern": None,
            "_sliding_window_pattern": 6,
            "layer_types": GEMMA3_LAYERS[:26],
            "rope_parameters": GEMMA3_ROPES,
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
            "use_bidirectional_attention": False,
        },
    ),
    "gemma3, both patterns": (GEMMA3_1B, {"layer_types": GEMMA3_LAYERS[:26], "_sliding_window_pattern": 6}),
    "gemma3, images": (  # stated twice, in the whole and in its parts
        GEMMA3_4B,
        {
            "torch_dtype": None,
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
            "text_config.dtype": "bfloat16",
            "text_config.eos_token_id": 1,
            "text_config.bos_token_id": 2,
            "text_config.rope_scaling": None,
            "text_config.rope_parameters": GEMMA3_ROPES | {GLOBAL: {"rope_theta": 1e6, **EIGHTFOLD}},
            "text_config.layer_types": GEMMA3_LAYERS,
            "text_config._sliding_window_pattern": 6,
            "vision_config": SIGLIP | {"dtype": "bfloat16", "layer_norm_eps": 1e-6, "num_channels": 3},
        },
    ),
    "gemma3, image ids": (
        GEMMA3_4B,
        {
            **dict.fromkeys(["image_token_index", "boi_token_index", "eoi_token_index"]),
            **{"image_token_id": 262144, "boi_token_id": 255999, "eoi_token_id": 256000},
        },
    ),
    "qwen3": (
        QWEN3_06B,
        {
            **dict.fromkeys(["rope_scaling", "rope_theta", "torch_dtype"]),
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "dtype": "bfloat16",
            "layer_types": [GLOBAL] * 28,
            "sliding_window": 4096,  # not used
        },
    ),
    "qwen3-vl": (
        QWEN3_VL_8B,
        {
            **dict.fromkeys(["text_config.rope_scaling", "text_config.rope_theta", "text_config.pad_token_id"]),
            "text_config.rope_parameters": {**QWEN3_VL_8B["text_config"]["rope_scaling"], "rope_theta": 5000000},
            "vision_config.model_type": "qwen3_vl_vision",
            "vision_config.rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
            "dtype": "bfloat16",
        },
    ),
    "qwen3-vl, experts": (QWEN3_VL_30B_A3B, {"text_config.tie_word_embeddings": True}),  # which is not read
}


def test_dtype_takes_precedence_over_torch_dtype(read):
    assert read(MINIMAL | {"torch_dtype": "bfloat16", "dtype": "float16"}).dtype == torch.float16


@pytest.mark.parametrize("family", SAME)
def test_transformers_5_says_the_same(read, family):
    old, new = SAME[family]
    assert read(changed(old, new)) == read(old)


# ---- defaults, and every field ----


def test_llamas_defaults_are_the_references(read):
    config = read(MINIMAL)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (6, 8, 2048)
    assert (config.norm_eps, config.tie_embeddings) == (1e-6, False)
    assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert config.rope == RopeConfig(base=10000.0, kind="default")
    assert (config.dtype, config.bos_id, config.eos_ids) == (torch.float32, None, ())
    nulls = dict.fromkeys(["head_dim", "num_key_value_heads", "rope_scaling", "sliding_window"])
    assert read({**MINIMAL, **nulls}) == config


COMMON = {
    "head_dim": 10,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1,
    "rope_theta": 300,
    "rope_scaling": {"type": "linear", "factor": 2},
    "torch_dtype": "float16",
    "bos_token_id": 5,
    "eos_token_id": 7,
}
ROPE = RopeConfig(300.0, "linear", 2.0)
GEMMA3_FIELDS = COMMON | {"num_attention_heads": 6, "num_key_value_heads": 2, "query_pre_attn_scalar": 7}
GEMMA3_EXPECTED = Gemma3Config(
    50, 48, 80, (9, None, None, 9), 6, 2, 10, 7.0, 77, 1.0, ROPE, RopeConfig(30.0), torch.float16, 5, (7,)
)


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (
            MINIMAL,
            COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            LlamaConfig(100, 48, 80, 3, 6, 2, 10, 77, 1.0, ROPE, True, torch.float16, 5, (7,), True, True),
        ),
        (TINY_GEMMA3, GEMMA3_FIELDS | {"rope_local_base_freq": 30}, GEMMA3_EXPECTED),
        (
            TINY_GEMMA3,
            without(GEMMA3_FIELDS, "rope_theta", "rope_scaling")
            | {"rope_parameters": {GLOBAL: {"rope_theta": 300, "rope_type": "linear", "factor": 2}}}
            | {"rope_local_base_freq": 30},
            GEMMA3_EXPECTED,
        ),
        (
            TINY_QWEN3,
            COMMON | {"tie_word_embeddings": True, "eos_token_id": [7, 8]},
            Qwen3Config(50, 48, 80, 3, 4, 2, 10, 77, 1.0, ROPE, True, torch.float16, 5, (7, 8)),
        ),
    ],
    ids=["llama", "gemma3", "gemma3, one rope", "qwen3"],
)
def test_every_field_reaches_the_config(read, base, change, expected):
    config = read({**base, **change})
    assert config == expected
    assert type(config.rope.base) is type(config.norm_eps) is float


def test_the_whole_of_a_gemma3_counts_more_than_its_text_config(read):
    text = {"text_config.dtype": "float16", "text_config.bos_token_id": 3, "text_config.eos_token_id": 4}
    config = read(changed(GEMMA3_4B, text))
    assert (config.dtype, config.bos_id, config.eos_ids) == (torch.bfloat16, 3, (1, 106))


def test_end_tokens_of_generation_config_go_first(read):
    read({**MINIMAL, "eos_token_id": 2})
    assert read({"eos_token_id": [3, 4], "temperature": 0.6}, "generation_config.json").eos_ids == (3, 4)
    assert read({"eos_token_id": 5}, "generation_config.json").eos_ids == (5,)
    assert read({"eos_token_id": None}, "generation_config.json").eos_ids == (2,)
    for wrong in ({"eos_token_id": "3"}, {"eos_token_id": [100]}, {"eos_token_id": [True]}, "[]", "{"):
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read(wrong, "generation_config.json")


# ---- edits, as fine-tuning leaves them ----
# Each kind of edit was compared with the logits of transformers 5.24, on tiny checkpoints of seven model types.
# Where it ignores a field that steers another architecture, pop refuses it nevertheless.

ALL = [LLAMA31_8B, GEMMA3_1B, GEMMA3_4B, QWEN3_06B, QWEN3_30B_A3B, QWEN3_VL_8B]
LLAMA, GEMMA, QWEN = [LLAMA31_8B], [GEMMA3_1B, GEMMA3_4B], [QWEN3_06B, QWEN3_30B_A3B, QWEN3_VL_8B]
DENSE = [*LLAMA, *GEMMA, QWEN3_06B, QWEN3_VL_8B]
GELU = "gelu_pytorch_tanh"
MROPE = {"mrope_section": [24, 20, 20]}
PARTS = ("text_config", "vision_config")
YARN = {"rope_type": "yarn", "factor": 4.0}


def edited(config: dict, edit: dict) -> dict:
    """The config with fields of its language model replaced, which may be a part of the whole."""
    prefix = "text_config." if "text_config" in config else ""
    return changed(config, {prefix + name: value for name, value in edit.items()})


# Fields of the language model, and the configs that they do not change.
HARMLESS = [
    (ALL, {"_attn_implementation_autoset": True, "attn_implementation": "eager", "cache_implementation": "hybrid"}),
    (ALL, {"_name_or_path": "somebody/base", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}),
    (ALL, {"unk_token_id": 0, "sep_token_id": 5, "pad_token_id": -1, "architectures": None}),
    (ALL, {"attention_dropout": 0.1, "hidden_dropout": 0.0, "resid_pdrop": 0.0}),  # inference drops nothing
    (ALL, {"pretraining_tp": 2, "architectures": []}),  # slices of the same product
    (ALL, {"mlp_bias": False, "attention_bias": False, "use_sliding_window": False, "use_qk_norm": False}),
    (ALL, {"rope_interleaved": False, "is_llama_config": True, "partial_rotary_factor": 1.0, "is_causal": True}),
    (ALL, {"use_cache": False, "output_attentions": True, "initializer_range": 0.5, "unsloth_fixed": True}),
    (ALL, {"transformers_version": "9.0.0", "id2label": {"0": "A"}, "problem_type": None, "num_labels": 1}),
    (ALL, {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 20}),
    (ALL, {"task_specific_params": {"x": [1, {"y": 2}]}, "my own field": {"nested": [1, 2]}}),
    (ALL, {"quantization_config": {}, "rope_parameters": {}, "attention_chunk_size": 0, "no_rope_layers": []}),
    (LLAMA, {"torch_dtype": "torch.bfloat16", "transformers.js_config": {"dtype": "q4"}}),
    (LLAMA, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}),
    (LLAMA, {"layer_types": [GLOBAL] * 32, "hidden_act": None, "num_local_experts": 0, "mlp_only_layers": []}),
    (GEMMA, {"hidden_act": GELU, "hidden_activation": GELU, "use_bidirectional_attention": False}),
    (GEMMA, {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    (QWEN, {"sliding_window": 4096, "max_window_layers": 28}),
    ([QWEN3_30B_A3B], {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
]


@pytest.mark.parametrize(("bases", "edit"), HARMLESS, ids=lambda value: str([*value])[:60] if value else "")
def test_a_harmless_edit_changes_nothing(read, caplog, bases, edit):
    for base in bases:
        expected = read(base)
        caplog.clear()
        with caplog.at_level(logging.INFO, "pop"):
            assert read(edited(base, edit)) == expected
        assert len(caplog.messages) <= 1


@pytest.mark.parametrize("base", [MINIMAL, TINY_GEMMA3, TINY_QWEN3, GEMMA3_4B, QWEN3_VL_8B])
def test_the_log_names_unknown_fields_and_nothing_else(read, caplog, base):
    with caplog.at_level(logging.INFO, "pop"):
        read(MINIMAL)
        assert not caplog.messages
        unknown = ["is_llama_config", "a field of tomorrow", "text_config.tomorrow", "vision_config.tomorrow"]
        read(changed(base, dict.fromkeys(unknown, 1)))
    assert len(caplog.messages) == 1
    assert all(repr(name) in caplog.text for name in unknown)


@pytest.mark.parametrize("base", ALL, ids=lambda base: base["model_type"])
@pytest.mark.parametrize("stated", [None, "auto"])
def test_without_a_dtype_it_is_that_of_the_weights(tmp_path, read, base, stated):
    config = edited(base, {"torch_dtype": None, "dtype": None}) | {"torch_dtype": stated, "dtype": None}
    assert read(config).dtype == torch.float32  # there are no weights
    weights = {"a.norm": torch.zeros(9), "a.matrix": torch.zeros(9, 9, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    assert read(config).dtype == torch.bfloat16
    save_file({"a": torch.zeros(9, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert read(config).dtype == torch.float32  # loading refuses these weights


# ---- refusals ----

# Fields of the language model that no family has, or that each has with another value only.
REFUSED_BY_ALL = {
    **dict.fromkeys(
        ["qkv_bias", "use_bias", "use_qk_norm", "qk_layernorm", "rope_interleaved", "attention_sinks"], True
    ),
    **dict.fromkeys(["logit_scale", "embedding_multiplier", "residual_multiplier", "clip_qkv"], 2.0),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping"], 30.0),
    **dict.fromkeys(["scale_emb", "attention_chunk_size", "num_kv_shared_layers", "kv_lora_rank"], 12),
    **dict.fromkeys(["shared_expert_intermediate_size", "n_routed_experts"], 64),
    "use_bidirectional_attention": True,
    "is_causal": False,
    "hidden_act": "relu",
    "partial_rotary_factor": 0.5,
    "no_rope_layers": [1, 0],
    "position_embedding_type": "alibi",
}
TEXT_ONLY = [*LLAMA, *QWEN]
# By configs: fields of the language model, each with values that are refused. The error names the field and the value.
REFUSED = [
    (ALL, {name: [value] for name, value in REFUSED_BY_ALL.items()}),
    (TEXT_ONLY, {"layer_types": [[LOCAL, "chunked_attention"]], "use_sliding_window": [True]}),
    (TEXT_ONLY, {"sliding_window_pattern": [6], "rope_local_base_freq": [1e4], "query_pre_attn_scalar": [256]}),
    ([*GEMMA, *QWEN], {"attention_bias": [True], "mlp_bias": [True]}),
    (DENSE, {"num_experts": [8], "moe_intermediate_size": [8]}),
    (LLAMA, {"sliding_window": [512], "num_local_experts": [8]}),
    (GEMMA, {"tie_word_embeddings": [False]}),
    ([*LLAMA, QWEN3_06B, *GEMMA[:1]], {"is_encoder_decoder": [True], "audio_config": [{"hidden_size": 8}]}),
    ([MINIMAL, TINY_GEMMA3, TINY_QWEN3], {"head_dim": [9]}),
    (
        [MINIMAL],
        {
            "model_type": ["mistral"],
            "rope_scaling": [[1.0]],
            "dtype": ["float8_e4m3fn"],
            "num_key_value_heads": [4],
            "num_attention_heads": [5],
            "hidden_size": [0, -48, 10**12],
            "num_hidden_layers": [10**5, "3", True],
            "vocab_size": [100.0],
            "rms_norm_eps": ["1e-5", 0],
            "tie_word_embeddings": [1],
            "eos_token_id": [100],
            "bos_token_id": [[1]],
        },
    ),
    (
        [TINY_GEMMA3],
        {
            "architectures": [["Gemma3ForConditionalGeneration"]],
            "hidden_activation": ["gelu"],
            "sliding_window": [0],
            "sliding_window_pattern": [0],
            "num_key_value_heads": [3],
            "vocab_size": [2],
        },
    ),
    (
        [TINY_QWEN3],
        {
            "sliding_window": ["all"],
            "layer_types": [[GLOBAL, LOCAL, GLOBAL]],
            "num_key_value_heads": [3],
            "architectures": [["Qwen3Model"]],
        },
    ),
    (
        [QWEN3_30B_A3B],
        {
            "num_local_experts": [64],
            "num_experts_per_tok": [129, 0],
            "mlp_only_layers": [[1.5]],
            "decoder_sparse_step": [0],
            "architectures": [["Qwen3ForCausalLM"]],
        },
    ),
    ([GEMMA3_4B], {"model_type": ["gemma2"], "vision_use_head": [True]}),
    ([QWEN3_VL_8B], {"model_type": ["qwen3"], "tie_word_embeddings": [True]}),
    ([QWEN3_VL_30B_A3B], {"norm_topk_prob": [False]}),
]
# The same for fields of the whole file. A path reaches into a part.
REFUSED_IN_WHOLE = [
    (ALL, {"architectures": [["LlamaForSequenceClassification"]], "model_type": ["gpt_oss"]}),
    (ALL, {"compression_config": [{"format": "pack"}], "is_encoder_decoder": [True], "audio_config": [{"layers": 2}]}),
    ([GEMMA3_4B, QWEN3_VL_8B], {"vision_config": [3], "text_config": [3]}),
    (
        [GEMMA3_4B],
        {
            "architectures": [["Gemma3ForCausalLM"]],
            "tie_word_embeddings": [False],
            "mm_tokens_per_image": [200],
            "image_token_id": [7],
            "vision_config.vision_use_head": [True],
            "vision_config.window_size": [3],
        },
    ),
    (
        [QWEN3_VL_8B],
        {
            "architectures": [["Qwen3ForCausalLM"]],
            "rope_theta": [1e6],
            "vision_config.out_hidden_size": [4095],
            "vision_config.num_heads": [17, 64],
            "vision_config.deepstack_visual_indexes": [[8, 27], [16, 8], "8"],
            "vision_config.num_position_embeddings": [2305],
            "vision_config.hidden_act": ["silu"],
            "vision_config.in_channels": [1],
            "vision_config.model_type": ["qwen2_5_vl"],
            "vision_config.window_size": [112],
        },
    ),
]
# Other changes, and what the error must name.
CONTRADICTIONS = [
    *((base, {"quantization_config": {"quant_method": "fp8", "bits": [4, 8]}}, "quantised", "'fp8'") for base in ALL),
    (MINIMAL, {"quantization_config": "fp8"}, "quantization_config", "'fp8'"),
    (MINIMAL, {"use_sliding_window": True, "sliding_window": 512}, "use_sliding_window = True"),
    (MINIMAL, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type", "'dynamic'"),
    (MINIMAL, {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor", "0.5"),
    (MINIMAL, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast = 32"),
    (MINIMAL, {"rope_scaling": {"rope_type": "linear", "type": "default"}}, "rope_type", "'linear'", "'default'"),
    (MINIMAL, {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    (MINIMAL, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta", "10000.0", "500000.0"),
    (
        MINIMAL,
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 100.0}, "rope_scaling": LLAMA3_ROPE},
        "rope_parameters and rope_scaling",
    ),
    (MINIMAL, {"rms_norm_eps": float("nan")}, "NaN"),
    (MINIMAL, {"rope_theta": float("inf")}, "Infinity"),
    *((base, {"rope_scaling": YARN}, "rope_type", "'yarn'") for base in (MINIMAL, TINY_GEMMA3, TINY_QWEN3)),
    (TINY_GEMMA3, {"sliding_window": None}, "sliding_window"),
    (TINY_GEMMA3, {"layer_types": None, "_sliding_window_pattern": 2}, "_sliding_window_pattern = 2"),
    (TINY_GEMMA3, {"layer_types": [LOCAL, GLOBAL, LOCAL, "chunked_attention"]}, "layer_types"),
    (TINY_GEMMA3, {"rope_theta": 1e4, "rope_parameters": {GLOBAL: {"rope_theta": 1e6}}}, "rope_theta", "10000.0"),
    (TINY_GEMMA3, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta = 1000000.0"),
    *((base, {part: None}, part, "is missing") for base in (GEMMA3_4B, QWEN3_VL_8B) for part in PARTS),
    (GEMMA3_4B, {"image_token_index": 262208}, "image_id (262208)", "vocab_size 262208"),
    (TINY_QWEN3, {"layer_types": [GLOBAL] * 4}, "layer_types"),
    (QWEN3_30B_A3B, {"num_experts": None}, "num_experts", "num_local_experts", "is missing"),
    (QWEN3_VL_8B, {"text_config.dtype": "float16", "dtype": "bfloat16"}, "dtype", "'bfloat16'", "'float16'"),
    *(
        (QWEN3_VL_8B, {"text_config.rope_scaling": {"mrope_section": [24, *rest]}}, "mrope_section", str([24, *rest]))
        for rest in ([20], [20, 21], [-20, 60])
    ),
    (QWEN3_VL_8B, {"text_config.rope_scaling": MROPE | {"mrope_interleaved": False}}, "mrope_interleaved", "False"),
    (QWEN3_VL_8B, {"image_token_id": 151936}, "image_", "[151936, 151656, 151652, 151653]", "vocab_size 151936"),
    (QWEN3_VL_8B, {"image_token_id": 151656}, "[151656, 151656, 151652, 151653]"),
    (QWEN3_VL_8B, {"text_config.num_hidden_layers": 2}, "deepstack_visual_indexes", "3 layers", "2"),
    (QWEN3_VL_8B, {"vision_config.rope_parameters": {"rope_type": "default"}}, "rope_type", "'default'"),
]


def single_values(table, change):
    """A file with one value changed, the field and the value, for each value of a table."""
    for bases, fields in table:
        for base in bases:
            for path, values in fields.items():
                for value in values:
                    named = [path.rpartition(".")[2], repr(value)]
                    yield change(base, {path: value}), named


FILES = [
    *single_values(REFUSED, edited),
    *single_values(REFUSED_IN_WHOLE, changed),
    *((changed(base, change), named) for base, change, *named in CONTRADICTIONS),
]


@pytest.mark.parametrize(("file", "named"), FILES, ids=[f"{file['model_type']}, {named[0]}" for file, named in FILES])
def test_refusals_name_file_field_and_value(read, file, named):
    with pytest.raises(ConfigError) as caught:
        read(file)
    for part in ("config.json", *named):
        assert part in str(caught.value)


@pytest.mark.parametrize("base", [MINIMAL, without(TINY_GEMMA3, "vocab_size", "layer_types"), TINY_QWEN3])
def test_missing_fields_are_named(read, base):
    read(base)
    for field in base:
        with pytest.raises(ConfigError, match=rf"config\.json: {field} is missing"):
            read(without(base, field))


@pytest.mark.parametrize("field", [field for field in LLAMA3_ROPE if field != "rope_type"])
def test_llama3_scaling_needs_all_its_fields(read, field):
    assert read({**MINIMAL, "rope_scaling": LLAMA3_ROPE}).rope == RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64)
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        read({**MINIMAL, "rope_scaling": without(LLAMA3_ROPE, field)})


# ---- broken files ----


@pytest.mark.parametrize("names", [["sliding_window"], ["dtype", "torch_dtype"], ["rope_scaling"]])
def test_deep_nesting_is_refused_whether_or_not_it_can_be_parsed(read, names):
    for depth in range(900, 1000, 9):
        fields = "".join(f', "{name}": ' + "[" * depth + "]" * depth for name in names)
        with pytest.raises(ConfigError):
            read(json.dumps(MINIMAL)[:-1] + fields + "}")


def test_a_folder_without_a_config_and_files_that_are_no_json_object(tmp_path, read):
    """tests/system/test_files.py has more of them."""
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)
    for text in ("", "[]", "null", "\ufeff{}"):
        with pytest.raises(ConfigError, match=r"config\.json"):
            read(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_of_any_field_is_read_or_refused(tmp_path_factory, data):
    base = data.draw(st.sampled_from([{**LLAMA31_8B, "head_dim": 128}, GEMMA3_4B, QWEN3_30B_A3B, QWEN3_VL_8B]))
    whole = changed(base, {})
    parts = [whole, *(value for value in whole.values() if type(value) is dict)]
    target = data.draw(st.sampled_from(parts))
    for _ in range(data.draw(st.integers(1, 3))):
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(json_values)
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(json.dumps(whole))
    try:
        config = read_config(folder)
    except ConfigError:
        return
    assert isinstance(config, LlamaConfig | Gemma3Config | Qwen3Config) and config.num_heads % config.num_kv_heads == 0
