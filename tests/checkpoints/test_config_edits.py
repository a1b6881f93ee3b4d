"""Edits of config.json as fine-tuning leaves them: harmless ones change nothing, dangerous ones are refused by name.

Each kind of edit was compared with the logits of transformers 5.24, on tiny checkpoints of seven model types. Where it
ignores a field that steers another architecture, pop refuses it nevertheless.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from support.published import GEMMA3_1B, GEMMA3_TEXTS, LLAMA31_8B, QWEN3_06B, QWEN3_30B_A3B, QWEN3_VL_8B
from support.published import gemma3_with_images as with_images

from pop.checkpoints.config_json import read_config
from pop.errors import ConfigError

LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3_4B = with_images(GEMMA3_TEXTS["4b"])
ALL = [LLAMA31_8B, GEMMA3_1B, GEMMA3_4B, QWEN3_06B, QWEN3_30B_A3B, QWEN3_VL_8B]
LLAMA, GEMMA, QWEN = [LLAMA31_8B], [GEMMA3_1B, GEMMA3_4B], [QWEN3_06B, QWEN3_30B_A3B, QWEN3_VL_8B]
GELU = "gelu_pytorch_tanh"

# Edits of the language model's fields, and the configs that they do not change.
HARMLESS = [
    (ALL, {"_attn_implementation_autoset": True}),
    (ALL, {"_name_or_path": "somebody/base", "_model_name_or_path": "elsewhere"}),
    (ALL, {"unk_token_id": 0, "sep_token_id": 5}),
    (ALL, {"pad_token_id": -1}),
    (ALL, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}),
    (ALL, {"architectures": []}),
    (ALL, {"architectures": None}),
    (ALL, {"attention_dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0}),
    (ALL, {"attention_dropout": 0.1}),  # inference drops nothing
    (ALL, {"pretraining_tp": 1}),
    (ALL, {"pretraining_tp": 2}),  # slices of the same product
    (ALL, {"mlp_bias": False, "attention_bias": False, "qkv_bias": False}),
    (ALL, {"use_sliding_window": False, "alibi": False}),
    (ALL, {"use_qk_norm": False, "attention_sinks": False}),
    (ALL, {"rope_interleaved": False, "is_llama_config": True}),
    (ALL, {"partial_rotary_factor": 1.0}),
    (ALL, {"is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False}),
    (ALL, {"use_cache": False, "output_attentions": True, "return_dict": False}),
    (ALL, {"initializer_range": 0.5, "init_method": "normal"}),
    (ALL, {"transformers_version": "9.0.0", "unsloth_version": "2025.9.1", "unsloth_fixed": True}),
    (ALL, {"id2label": {"0": "A"}, "label2id": {"A": 0}, "problem_type": None, "num_labels": 1}),
    (ALL, {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 20}),
    (ALL, {"task_specific_params": {"x": [1, {"y": 2}]}, "my own field": {"nested": [1, 2]}}),
    (ALL, {"torchscript": False, "chunk_size_feed_forward": 0, "pruned_heads": {}}),
    (ALL, {"cache_implementation": "hybrid", "attn_implementation": "eager"}),
    (ALL, {"quantization_config": {}, "rope_parameters": {}, "rope_scaling_type": None}),
    (ALL, {"attention_chunk_size": 0, "num_kv_shared_layers": 0, "no_rope_layers": []}),
    (LLAMA, {"torch_dtype": "torch.bfloat16"}),
    (LLAMA, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}),
    (LLAMA, {"layer_types": [GLOBAL] * 32}),
    (LLAMA, {"hidden_act": None, "rms_norm_eps": 1e-05}),
    (LLAMA, {"num_local_experts": 0, "num_experts_per_tok": 0, "mlp_only_layers": []}),
    (GEMMA, {"hidden_act": GELU, "hidden_activation": GELU}),
    (GEMMA, {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    (GEMMA, {"use_bidirectional_attention": False}),
    ([QWEN3_06B], {"layer_types": [GLOBAL] * 28}),
    (QWEN, {"sliding_window": 4096, "max_window_layers": 28}),
    ([QWEN3_30B_A3B], {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
]

# Edits, the configs that refuse them, and the words by which the error names them.
DANGEROUS = [
    *((ALL, {name: True}, f"{name} = True") for name in ("qkv_bias", "use_bias", "use_qk_norm", "qk_layernorm")),
    *((ALL, {name: 2.0}, f"{name} = 2.0") for name in ("logit_scale", "embedding_multiplier", "residual_multiplier")),
    (ALL, {"scale_emb": 12}, "scale_emb = 12"),
    (ALL, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    (ALL, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    (ALL, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    (ALL, {"is_causal": False}, "is_causal must be True, not False"),
    (ALL, {"hidden_act": "relu"}, "hidden_act must be"),
    (ALL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, not 0.5"),
    (ALL, {"rope_interleaved": True}, "rope_interleaved = True"),
    (ALL, {"no_rope_layers": [1, 0]}, "no_rope_layers = [1, 0]"),
    (ALL, {"attention_chunk_size": 8192}, "attention_chunk_size = 8192"),
    (ALL, {"attention_sinks": True}, "attention_sinks = True"),
    (ALL, {"num_kv_shared_layers": 10}, "num_kv_shared_layers = 10"),
    (ALL, {"kv_lora_rank": 512}, "kv_lora_rank = 512"),
    (ALL, {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    (ALL, {"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
    (ALL, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
    (ALL, {"n_routed_experts": 64}, "n_routed_experts = 64"),
    (ALL, {"layer_types": [LOCAL, "chunked_attention"]}, "layer_types"),
    (LLAMA, {"dtype": "float8_e4m3fn", "torch_dtype": None}, "'float8_e4m3fn'"),
    ([*LLAMA, *QWEN], {"sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
    ([*LLAMA, *QWEN], {"use_sliding_window": True, "sliding_window": 512}, "use_sliding_window = True"),
    ([*LLAMA, *QWEN], {"rope_local_base_freq": 1e4}, "rope_local_base_freq = 10000.0"),
    ([*LLAMA, *QWEN], {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar = 256"),
    (LLAMA, {"sliding_window": 512}, "sliding_window = 512"),
    ([*GEMMA, *QWEN], {"attention_bias": True}, "attention_bias = True"),
    ([*GEMMA, *QWEN], {"mlp_bias": True}, "mlp_bias = True"),
    ([*LLAMA, *GEMMA, QWEN3_06B, QWEN3_VL_8B], {"num_experts": 8}, "num_experts (num_local_experts) = 8"),
    ([*LLAMA, *GEMMA, QWEN3_06B, QWEN3_VL_8B], {"moe_intermediate_size": 8}, "moe_intermediate_size = 8"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be one of default, linear, llama3"),
    ([QWEN3_06B], {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type must be one of"),
    (GEMMA, {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_type must be one of"),
    (GEMMA, {"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
    ([QWEN3_VL_8B], {"rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": False}}, "mrope_interleaved"),
]
# Edits of the whole file, whatever its parts.
DANGEROUS_WHOLE = [
    *(({"quantization_config": {"quant_method": method}}, repr(method)) for method in ("gptq", "awq", "bitsandbytes")),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack"}}, "'compressed-tensors'"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quantised ('fp8')"),
    ({"compression_config": {"format": "pack"}}, "compression_config"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures must be"),
    ({"model_type": "gpt_oss"}, "model_type must be one of llama"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder = True"),
    ({"audio_config": {"hidden_size": 8}}, "audio_config"),
]


def edited(config: dict, edit: dict, whole: bool = False) -> dict:
    """The config with fields of its language model replaced, or those of the whole file."""
    if whole or "text_config" not in config:
        return config | edit
    return config | {"text_config": config["text_config"] | edit}


def read(folder, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def cases(table: list) -> list:
    named = [(base, edit, *named) for bases, edit, *named in table for base in bases]
    return [pytest.param(*case, id=f"{case[0]['model_type']}: {json.dumps(case[1])[:60]}") for case in named]


@pytest.mark.parametrize(("base", "edit"), cases(HARMLESS))
def test_a_harmless_edit_changes_nothing(tmp_path, caplog, base, edit):
    expected = read(tmp_path, base)
    with caplog.at_level(logging.INFO, "pop"):
        caplog.clear()
        assert read(tmp_path, edited(base, edit)) == expected
    assert len(caplog.messages) <= 1


@pytest.mark.parametrize(("base", "edit", "named"), cases(DANGEROUS))
def test_a_dangerous_edit_is_refused_by_name(tmp_path, base, edit, named):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, edited(base, edit))
    assert named in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize(("base", "edit", "named"), cases([(ALL, *case) for case in DANGEROUS_WHOLE]))
def test_a_dangerous_edit_of_the_whole_is_refused_by_name(tmp_path, base, edit, named):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, edited(base, edit, whole=True))
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_llamas_biases_are_honoured(tmp_path, name):
    assert getattr(read(tmp_path, LLAMA31_8B | {name: True}), name)


@pytest.mark.parametrize("base", ALL, ids=lambda base: base["model_type"])
@pytest.mark.parametrize("stated", [None, "auto"])
def test_without_a_dtype_it_is_that_of_the_weights(tmp_path, base, stated):
    config = edited(base, {"torch_dtype": None, "dtype": None}) | {"torch_dtype": stated, "dtype": None}
    assert read(tmp_path, config).dtype == torch.float32  # there are no weights
    weights = {"a.norm": torch.zeros(9), "a.matrix": torch.zeros(9, 9, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    assert read(tmp_path, config).dtype == torch.bfloat16
    save_file({"a": torch.zeros(9, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert read(tmp_path, config).dtype == torch.float32  # loading refuses these weights
