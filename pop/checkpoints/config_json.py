"""From a checkpoint's config.json to a config (pop/models/config.py).

`read_config(folder)` reads the Hugging Face layout, as transformers 4 or 5 writes it. It refuses values that are
missing, wrong, contradictory or not supported. It ignores fields that no forward pass depends on.
A new family needs an entry in `READERS`. `read_llama` reads any config.json with Llama's fields.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pop.checkpoints.fields import Fields
from pop.checkpoints.weights import instead, stored_dtype
from pop.errors import ConfigError
from pop.models import config as configs
from pop.system.files import read_json, refuse_pointers

# Fields that change the forward pass of some architecture. A field that the reader does not take is refused, unless it
# is off: false, 0 or empty.
FORWARD_PASS = """
    is_encoder_decoder add_cross_attention text_config vision_config audio_config
    quantization_config compression_config hidden_act hidden_activation
    attention_bias qkv_bias use_qkv_bias add_qkv_bias attention_out_bias mlp_bias use_bias lm_head_bias
    qk_norm use_qk_norm qk_layernorm query_pre_attn_scalar attention_multiplier attn_temperature_tuning
    attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling
    embedding_multiplier residual_multiplier scale_emb scale_depth
    sliding_window use_sliding_window sliding_window_pattern _sliding_window_pattern layer_types window_size
    fullatt_block_indexes attention_chunk_size use_bidirectional_attention num_kv_shared_layers kv_lora_rank
    alibi position_embedding_type rope_theta rope_scaling rope_parameters rope_local_base_freq rope_interleaved
    rope_interleave rotary_pct rotary_dim partial_rotary_factor no_rope_layers no_rope_layer_interval
    num_experts num_experts_per_tok n_routed_experts n_shared_experts num_shared_experts
    moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step mlp_only_layers norm_topk_prob
    clip_qkv layer_norm_eps layer_norm_epsilon norm_type post_norm sandwich_norm attention_sinks multi_query
    vision_use_head
""".split()  # noqa: SIM905


def read_config(folder: str | Path) -> configs.Config:
    """Read the config of a checkpoint from config.json.

    The end tokens of generation_config.json replace those of config.json, because chat models list the token that ends
    a turn only there. A config without a dtype gets that of the weights. Raises ConfigError, which names the file and
    the field.
    """
    folder = Path(folder)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise ConfigError(f"{folder} is not a folder that can be read ({error.strerror}); check the path") from None
    refuse_pointers(folder)
    if "config.json" not in names:
        raise ConfigError(f"{folder} is not a checkpoint folder: it lacks config.json{instead(names)}")
    config = read_fields(folder / "config.json", _read_family, FORWARD_PASS)
    if config.dtype is None:
        config = replace(config, dtype=stored_dtype(folder))
    path = folder / "generation_config.json"
    if path.exists():
        # Wrong ids are found when the config is made, and that error names this file.
        config = read_fields(path, lambda fields: replace(config, eos_ids=_read_ends(fields, config.eos_ids)), ())
    return config


def read_sampling(folder: Path) -> dict[str, Any] | None:
    """Return the options of sampling that generation_config.json states, unchecked. None if it is missing."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    stated = read_json(path)
    names = ["repetition_penalty"]
    options = {}
    if stated.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
        options["temperature"] = 1.0
    for name in names:
        if stated.get(name) not in (None, 0):  # a top_k of 0 means all tokens
            options[name] = stated[name]
    return options


def read_fields(path: Path, reader: Callable[[Fields], Any], unsupported: Container[str] | None, advice="") -> Any:
    """Return what `reader` makes of the fields of a file. Errors name the file, and `advice` ends them."""
    values = read_json(path)
    try:
        fields = Fields(values)
        result = reader(fields)
        fields.finish(unsupported)
    except (ConfigError, RecursionError) as error:  # deeply nested values can be neither compared nor shown
        raise ConfigError(f"{path}: {error}{advice}") from None
    return result


def _read_family(fields: Fields) -> configs.Config:
    if method := fields.object("quantization_config"):
        name = method.get("quant_method", "an unknown method")
        raise ConfigError(f"quantization_config: the weights are quantised ({name!r:.80}); take the original ones")
    architecture, read = READERS[fields.choice("model_type", READERS)]
    fields.fixed(architectures=[architecture])
    return read(fields)


# What config.json calls the fields of our configs, where the names differ.
NAMES = {
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
    "image_id": "image_token_id", "boi_id": "boi_token_id", "eoi_id": "eoi_token_id", "video_id": "video_token_id",
    "start_id": "vision_start_token_id", "end_id": "vision_end_token_id",
    "count": "num_experts", "per_token": "num_experts_per_tok", "width": "moe_intermediate_size",
    "out_size": "out_hidden_size", "merge_size": "spatial_merge_size", "frames": "temporal_patch_size",
}  # fmt: skip
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # values of layer_types


def _build(config: type, fields: Fields, names: dict[str, str] = NAMES, **given: Any) -> Any:
    """Make a config. Read its integers, numbers and booleans, unless given. Those without a default are required."""
    readers = {int: fields.integer, float: fields.number, bool: fields.boolean}
    for field in dataclasses.fields(config):
        read = readers.get(field.type)
        if read and field.name not in given:
            given[field.name] = read(names.get(field.name, field.name), field.default)
    return config(**given)


def _build_decoder(config: type, fields: Fields, **given: Any) -> Any:
    fields.fixed(is_causal=True, partial_rotary_factor=1.0)
    dtype = fields.choice("dtype", ["auto", *configs.DTYPES, *(f"torch.{name}" for name in configs.DTYPES)], "auto")
    return _build(
        config,
        fields,
        dtype=configs.DTYPES.get(dtype.removeprefix("torch.")),
        bos_id=fields.integer("bos_token_id", config.bos_id, least=0),
        eos_ids=_read_ends(fields, config.eos_ids),
        **given,
    )


def _build_full_attention(config: type, fields: Fields, **given: Any) -> Any:
    """Make a config like Llama's or Qwen3's, whose layers have one RoPE and no windows."""
    num_layers = fields.integer("num_hidden_layers")
    fields.fixed(hidden_act="silu", layer_types=[GLOBAL] * num_layers)
    if fields.left.get("use_sliding_window") is False:
        fields.left.pop("sliding_window", None)
    if "rope" not in given:
        given["rope"] = _read_rope(_rope_fields(fields), config.rope.base)
    return _build_decoder(config, fields, num_layers=num_layers, **given)


def _read_ends(fields: Fields, default: tuple[int, ...]) -> tuple[int, ...]:
    """Read the end tokens: one token id, or a list of them."""
    if isinstance(fields.left.get("eos_token_id"), list):
        return fields.integers("eos_token_id") or default
    end = fields.integer("eos_token_id", None, least=0)
    return default if end is None else (end,)


def read_llama(fields: Fields, config: type = configs.LlamaConfig) -> configs.LlamaConfig:
    """Read a config.json with Llama's fields into LlamaConfig, or into a class like it."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    if "head_dim" not in fields.left and hidden_size % num_heads:
        raise ConfigError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return _build_full_attention(
        config,
        fields,
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
    )


def _read_gemma3_text(fields: Fields, **given: Any) -> configs.Gemma3Config:
    """Read Gemma-3's text model. Published files leave out most fields that have the reference's default."""
    fields.fixed(hidden_activation="gelu_pytorch_tanh", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
    ropes = fields.part("rope_parameters")  # transformers 5
    rope = _rope_fields(fields, "rope_theta", ropes.object(GLOBAL), fields.object("rope_scaling"))
    local_rope = _rope_fields(fields, "rope_local_base_freq", ropes.object(LOCAL))
    ropes.finish()
    return _build_decoder(
        configs.Gemma3Config,
        fields,
        vocab_size=fields.integer("vocab_size", 262_208),
        windows=_read_windows(fields),
        rope=_read_rope(rope, configs.Gemma3Config.rope.base),
        local_rope=_read_rope(local_rope, configs.Gemma3Config.local_rope.base),
        **given,
    )


def _read_gemma3(fields: Fields) -> configs.Gemma3Config:
    """Read Gemma-3 with a vision tower. The whole model's fields take precedence over its text_config's."""
    fields.fixed(tie_word_embeddings=True)
    text = fields.part("text_config")
    text.fixed(model_type="gemma3_text")
    _pass_on(fields, text)
    vision = fields.part("vision_config")
    vision.fixed(model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh", num_channels=3)
    siglip = _build(
        configs.SiglipConfig,
        vision,
        NAMES | {"norm_eps": "layer_norm_eps"},
        tokens_per_image=fields.integer("mm_tokens_per_image", configs.SiglipConfig.tokens_per_image),
    )
    return _read_gemma3_text(text, vision=siglip)


def _pass_on(whole: Fields, text: Fields) -> None:
    """Move the dtype and the token ids of a multimodal model to its text_config, where they replace what is there."""
    for name in list(whole.left):
        if name == "dtype" or name.endswith("_token_id"):
            text.left[name] = whole.left.pop(name)


def _read_windows(fields: Fields) -> tuple[int | None, ...]:
    """Read each layer's window from layer_types or, if that is missing, from sliding_window_pattern."""
    layers = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window")
    pattern = fields.integer("sliding_window_pattern", 6)
    if "layer_types" in fields.left:
        fields.left.pop("_sliding_window_pattern", None)  # transformers 5 writes it, but does not read it
    types = fields.take(
        "layer_types",
        f"a list of {LOCAL} or {GLOBAL} for each of {layers} layers",
        lambda v: type(v) is list and len(v) == layers and all(kind in (LOCAL, GLOBAL) for kind in v),
        [LOCAL if n % pattern else GLOBAL for n in range(1, layers + 1)],  # every n-th is global
    )
    return tuple(window if kind == LOCAL else None for kind in types)


def _read_qwen3_vl(fields: Fields, experts: bool = False) -> configs.Qwen3VLConfig:
    text = fields.part("text_config")
    text.fixed(model_type=f"qwen3_vl{'_moe' if experts else ''}_text")
    if experts:
        text.left.setdefault("norm_topk_prob", True)  # the reference does not read it
        text.left.pop("tie_word_embeddings", None)  # the reference saves a default there, and does not read it
    text.add("tie_word_embeddings", fields.boolean("tie_word_embeddings"))
    _pass_on(fields, text)
    rope = _rope_fields(text)
    rope.fixed(mrope_interleaved=True)
    return _read_qwen3(
        text,
        experts,
        configs.Qwen3VLConfig,
        mrope_sections=rope.integers("mrope_section"),
        rope=_read_rope(rope, 500_000.0),
        vision=_read_qwen3_vision(fields.part("vision_config")),
    )


def _read_qwen3(fields: Fields, experts: bool = False, config: type = configs.Qwen3Config, **given: Any) -> Any:
    """Read Qwen3's text model, whose MLPs may be mixtures of experts."""
    fields.integer("sliding_window", None, least=0)  # the reference uses it only with use_sliding_window
    if experts:
        fields.fixed(decoder_sparse_step=1, mlp_only_layers=[])
        fields.take("norm_topk_prob", "true", lambda value: value is True)  # without it, the reference has false
        given["experts"] = _build(configs.ExpertsConfig, fields)
    return _build_full_attention(config, fields, **given)


def _read_qwen3_vision(fields: Fields) -> configs.Qwen3VisionConfig:
    """Read the vision_config of Qwen3-VL. Published files state the whole model's type there."""
    fields.choice("model_type", ("qwen3_vl_vision", "qwen3_vl", "qwen3_vl_moe_vision", "qwen3_vl_moe"), None)
    fields.fixed(hidden_act="gelu_pytorch_tanh", in_channels=3)
    rope = fields.part("rope_parameters")
    rope.fixed(rope_type="axial", rope_theta=configs.RopeConfig.base)
    rope.finish()
    return _build(
        configs.Qwen3VisionConfig,
        fields,
        NAMES | {"num_layers": "depth", "num_heads": "num_heads"},
        deepstack=fields.integers("deepstack_visual_indexes"),
        position_side=math.isqrt(fields.integer("num_position_embeddings", 48**2)),
    )


def _rope_fields(fields: Fields, base: str = "rope_theta", *objects: dict[str, Any]) -> Fields:
    """Collect a RoPE's fields from objects. `base` names the outer field in which transformers 4 states its base."""
    objects = objects or (fields.object("rope_parameters"), fields.object("rope_scaling"))
    stated = [Fields(values, fields.place) for values in objects if values] or [Fields({}, fields.place)]
    theta = fields.left.pop(base, None)
    for rope in stated:
        rope.add("rope_theta", theta)
        if rope.left != stated[0].left:  # the reference takes rope_scaling alone
            raise ConfigError("rope_parameters and rope_scaling differ, and only one can be meant; remove the other")
    return stated[0]


def _read_rope(rope: Fields, default_base: float) -> configs.RopeConfig:
    kind = rope.choice("rope_type", ("default", "linear", "llama3"), "default")
    base = rope.number("rope_theta", default_base)
    scaling = {}
    if kind != "default":
        scaling["factor"] = rope.number("factor")
    if kind == "llama3":
        scaling["low_freq_factor"] = rope.number("low_freq_factor")
        scaling["high_freq_factor"] = rope.number("high_freq_factor")
        scaling["original_max_positions"] = rope.integer("original_max_position_embeddings")
    rope.fixed(partial_rotary_factor=1.0)
    rope.finish()
    return configs.RopeConfig(base, kind, **scaling)


READERS: dict[str, tuple[str, Callable[[Fields], configs.Config]]] = {  # by config.json's model_type, its architecture
    "llama": ("LlamaForCausalLM", read_llama),
    "gemma3_text": ("Gemma3ForCausalLM", _read_gemma3_text),
    "gemma3": ("Gemma3ForConditionalGeneration", _read_gemma3),
    "qwen3": ("Qwen3ForCausalLM", _read_qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", partial(_read_qwen3, experts=True)),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", _read_qwen3_vl),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", partial(_read_qwen3_vl, experts=True)),
    "olmo2": ("Olmo2ForCausalLM", partial(read_llama, config=configs.Olmo2Config)),
}
