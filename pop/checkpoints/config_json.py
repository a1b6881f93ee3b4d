"""From a checkpoint's config.json or params.json to a config (pop/models/config.py), strictly.

`read_config(folder)` reads the Hugging Face layout (config.json as transformers 4 or 5 write it, and the
end tokens of generation_config.json) or Meta's own (params.json). A config steers arithmetic, so whatever is
missing, of a wrong type, contradictory, or not built in this library is refused by name; only fields known to
leave the forward pass alone are ignored. JSON null means "not given".

A new family is a dataclass, a reader (Fields -> dataclass) and an entry in `READERS`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pop.checkpoints.fields import Fields
from pop.checkpoints.params_json import read_meta
from pop.errors import ConfigError
from pop.files import read_json
from pop.models.config import (
    DTYPES,
    Config,
    ExpertsConfig,
    Gemma3Config,
    LlamaConfig,
    Qwen3Config,
    Qwen3VisionConfig,
    Qwen3VLConfig,
    RopeConfig,
    SiglipConfig,
)


def read_config(folder: str | Path) -> Config:
    """Read the config of the checkpoint in `folder`, from config.json or else params.json.

    End tokens of generation_config.json replace config.json's: chat models list the end of a turn only there.
    Where no dtype is stated, it is float32. Raises ConfigError, naming the file and the field.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        config = _read(folder / "config.json", _read_hf)
    elif (folder / "params.json").exists():
        config = _read(folder / "params.json", read_meta)
    else:
        raise ConfigError(f"{folder} is no checkpoint folder: it holds neither config.json nor params.json")
    if (ends := folder / "generation_config.json").exists():
        config = _read(ends, lambda fields: replace(config, eos_ids=_read_ends(fields) or config.eos_ids))
    return config


def _read(path: Path, reader: Callable[[Fields], Config]) -> Config:
    fields = Fields(read_json(path))
    try:
        return reader(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ---- Hugging Face's config.json ----

# Each kind of RoPE and the fields it needs besides the base.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KINDS = {"default": (), "linear": ("factor",), "llama3": LLAMA3}
# Fields with one supported value; any other asks for arithmetic that is not built here.
DECODER = {"is_encoder_decoder": False, "add_cross_attention": False, "is_causal": True}
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "pretraining_tp": 1, "rope_interleaved": False}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
          "tie_word_embeddings": True, "use_bidirectional_attention": False}  # fmt: skip
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "attention_bias": False,
         "use_sliding_window": False}  # fmt: skip
QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"]}
QWEN3_VL = {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False}
QWEN3_VL_MOE = {"model_type": "qwen3_vl_moe_text", "norm_topk_prob": True}
LOCAL, GLOBAL = "sliding_attention", "full_attention"  # Gemma's layer types
# Fields that leave the forward pass alone: training, bookkeeping, generation defaults of old configs.
HARMLESS = """
    _name_or_path transformers_version transformers.js_config is_llama_config tokenizer_class is_decoder
    initializer_range attention_dropout use_cache pad_token_id sep_token_id decoder_start_token_id torchscript
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate pruned_heads
    use_bfloat16 chunk_size_feed_forward id2label label2id problem_type finetuning_task task_specific_params
    tie_encoder_decoder cross_attention_hidden_size tf_legacy_loss max_sequence_length unsloth_version
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty bad_words_ids
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size suppress_tokens
    encoder_no_repeat_ngram_size forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
    num_return_sequences begin_suppress_tokens remove_invalid_values unsloth_fixed prefix cache_implementation
    output_router_logits router_aux_loss_coef
"""


def _read_hf(fields: Fields) -> Config:
    for name in HARMLESS.split():
        fields.left.pop(name, None)
    config = READERS[fields.choice("model_type", READERS)](fields)
    fields.finish()
    return config


def _read_llama(fields: Fields) -> LlamaConfig:
    for name, only in (DECODER | LLAMA).items():
        fields.fixed(name, only)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", most=2**12)
    head_dim = fields.integer("head_dim", None, most=2**12)
    if head_dim is None and hidden_size % num_heads:
        raise ConfigError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return LlamaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", most=2**12),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim or hidden_size // num_heads,
        max_positions=fields.integer("max_position_embeddings", LlamaConfig.max_positions),
        norm_eps=fields.number("rms_norm_eps", LlamaConfig.norm_eps),
        rope=_read_single_rope(fields),
        tie_embeddings=fields.boolean("tie_word_embeddings"),
        attention_bias=fields.boolean("attention_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
        dtype=_read_dtype(fields),
        bos_id=fields.integer("bos_token_id", None, least=0),
        eos_ids=_read_ends(fields),
    )


def _read_gemma3_text(fields: Fields) -> Gemma3Config:
    """What it leaves out has the reference's default, and in published files it leaves out much."""
    for name, only in (DECODER | GEMMA3).items():
        fields.fixed(name, only)
    default = Gemma3Config
    rope, local_rope = _read_gemma3_ropes(fields)
    return Gemma3Config(
        vocab_size=fields.integer("vocab_size", 262_208),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        windows=_read_windows(fields),
        num_heads=fields.integer("num_attention_heads", default.num_heads, most=2**12),
        num_kv_heads=fields.integer("num_key_value_heads", default.num_kv_heads),
        head_dim=fields.integer("head_dim", default.head_dim, most=2**12),
        query_pre_attn_scalar=fields.number("query_pre_attn_scalar", default.query_pre_attn_scalar),
        max_positions=fields.integer("max_position_embeddings", default.max_positions),
        norm_eps=fields.number("rms_norm_eps", default.norm_eps),
        rope=rope,
        local_rope=local_rope,
        dtype=_read_dtype(fields),
        bos_id=fields.integer("bos_token_id", default.bos_id, least=0),
        eos_ids=_read_ends(fields) or default.eos_ids,
    )


def _read_gemma3(fields: Fields) -> Gemma3Config:
    """With a vision tower. Of what both the whole and its text_config may state, the whole counts."""
    fields.fixed("architectures", ["Gemma3ForConditionalGeneration"])
    for name in ("is_encoder_decoder", "tie_word_embeddings"):
        fields.fixed(name, (DECODER | GEMMA3)[name])
    text, vision = (Fields(_take_object(fields, name)) for name in ("text_config", "vision_config"))
    for name in HARMLESS.split():
        text.left.pop(name, None)
    text.fixed("model_type", "gemma3_text")
    for names in (("dtype", "torch_dtype"), ("bos_token_id",), ("eos_token_id",)):
        stated = {name: fields.left.pop(name) for name in names if name in fields.left}
        if stated:
            text.left = {name: value for name, value in text.left.items() if name not in names} | stated
    tokens_per_image = fields.integer("mm_tokens_per_image", SiglipConfig.tokens_per_image)
    config = replace(
        _read_gemma3_text(text),
        vision=read_siglip(vision, tokens_per_image),
        image_id=_read_token(fields, "image", Gemma3Config.image_id),
        boi_id=_read_token(fields, "boi", Gemma3Config.boi_id),
        eoi_id=_read_token(fields, "eoi", Gemma3Config.eoi_id),
    )
    text.finish()
    return config


def _read_token(fields: Fields, name: str, default: int) -> int:
    """From NAME_token_index, as published, or NAME_token_id."""
    old, new = (fields.integer(f"{name}_token_{kind}", None, least=0) for kind in ("index", "id"))
    if None not in (old, new) and old != new:
        raise ConfigError(f"{name}_token_index ({old}) and {name}_token_id ({new}) disagree")
    return next((value for value in (old, new) if value is not None), default)


def _read_windows(fields: Fields) -> tuple[int | None, ...]:
    """From layer_types (transformers 5), or sliding_window_pattern (4): of so many layers the last one is global."""
    layers, window = fields.integer("num_hidden_layers", most=2**12), fields.integer("sliding_window")
    types = fields.take("layer_types", "a list", lambda v: type(v) is list, None)
    if types is not None:
        fields.left.pop("_sliding_window_pattern", None)  # transformers 5 writes it, but does not read it
    pattern = fields.integer("sliding_window_pattern", 6 if types is None else None)
    if pattern is not None:
        periodic = [LOCAL if n % pattern else GLOBAL for n in range(1, layers + 1)]
        if types not in (None, periodic):
            raise ConfigError(f"layer_types and sliding_window_pattern ({pattern}) disagree")
        types = periodic
    if len(types) != layers or any(kind not in (LOCAL, GLOBAL) for kind in types):
        raise ConfigError(f"layer_types must be {LOCAL} or {GLOBAL} for each of {layers} layers, not {types!r:.80}")
    return tuple(window if kind == LOCAL else None for kind in types)


def _read_gemma3_ropes(fields: Fields) -> tuple[RopeConfig, RopeConfig]:
    """The global and the local one: from rope_parameters by layer type (transformers 5), or by older fields (4)."""
    both = Fields(_take_object(fields, "rope_parameters"))
    of_global, of_local = (_take_object(both, kind) for kind in (GLOBAL, LOCAL))
    both.finish()
    base, local_base = (fields.left.pop(name, None) for name in ("rope_theta", "rope_local_base_freq"))
    scaling = _take_object(fields, "rope_scaling")
    return (
        _read_rope(_merged([{"rope_theta": base}, of_global, scaling]), Gemma3Config.rope.base),
        _read_rope(_merged([{"rope_theta": local_base}, of_local]), Gemma3Config.local_rope.base),
    )


def _read_qwen3(fields: Fields, mixture: bool = False) -> Qwen3Config:
    """mixture: of experts."""
    for name, only in (DECODER | QWEN3 | (QWEN3_MOE if mixture else {})).items():
        fields.fixed(name, only)
    for name in ("sliding_window", "max_window_layers"):  # of windows that use_sliding_window has switched off
        fields.integer(name, None, least=0)
    sizes = _read_qwen3_sizes(fields)
    if mixture:
        sizes["experts"] = _read_experts(fields, sizes["num_layers"], fields.boolean("norm_topk_prob"))
    fields.fixed("layer_types", [GLOBAL] * sizes["num_layers"])
    tied = fields.boolean("tie_word_embeddings")
    return Qwen3Config(**sizes, rope=_read_single_rope(fields), tie_embeddings=tied, dtype=_read_dtype(fields))


def _read_qwen3_sizes(fields: Fields) -> dict[str, Any]:
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers", most=2**12),
        "num_heads": fields.integer("num_attention_heads", most=2**12),
        "num_kv_heads": fields.integer("num_key_value_heads"),
        "head_dim": fields.integer("head_dim", Qwen3Config.head_dim, most=2**12),
        "max_positions": fields.integer("max_position_embeddings", Qwen3Config.max_positions),
        "norm_eps": fields.number("rms_norm_eps", Qwen3Config.norm_eps),
        "bos_id": fields.integer("bos_token_id", None, least=0),
        "eos_ids": _read_ends(fields),
    }


def _read_experts(fields: Fields, num_layers: int, normalised: bool) -> ExpertsConfig:
    counts = {name: fields.integer(name, None, most=2**12) for name in ("num_experts", "num_local_experts")}
    counts = {count: name for name, count in counts.items() if count is not None}  # as published, as saved
    if len(counts) != 1:
        raise ConfigError("num_experts and num_local_experts " + ("disagree" if counts else "are both missing"))
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.take("mlp_only_layers", "a list of layers", lambda v: type(v) is list and _are_counts(v), [])
    return ExpertsConfig(
        count=next(iter(counts)),
        per_token=fields.integer("num_experts_per_tok"),
        width=fields.integer("moe_intermediate_size"),
        layers=tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense),
        normalised=normalised,
    )


def _read_qwen3_vl(fields: Fields, mixture: bool = False) -> Qwen3VLConfig:
    """mixture: of experts."""
    fields.fixed("architectures", [f"Qwen3VL{'Moe' if mixture else ''}ForConditionalGeneration"])
    fields.fixed("is_encoder_decoder", False)
    text, vision = (Fields(_take_object(fields, name)) for name in ("text_config", "vision_config"))
    for part in (text, vision):
        for name in HARMLESS.split():
            part.left.pop(name, None)
    tied, dtype, ends = fields.boolean("tie_word_embeddings"), _read_dtype(fields, text), _read_ends(fields)
    for name, only in (DECODER | QWEN3_VL | (QWEN3_VL_MOE if mixture else {})).items():
        text.fixed(name, only)
    stated = text.take("tie_word_embeddings", "true or false", lambda v: type(v) is bool, tied)
    if stated != tied and not mixture:  # of mixtures the reference saves a default there, and reads the whole's
        raise ConfigError(f"tie_word_embeddings is {tied}, but the opposite in text_config")
    sections, rope = _read_mrope(text)
    sizes = _read_qwen3_sizes(text)
    if mixture:
        text.integer("sliding_window", None, least=0)  # which the reference does not read
        sizes["experts"] = _read_experts(text, sizes["num_layers"], normalised=True)
    text.finish()
    return Qwen3VLConfig(
        **sizes | ({"eos_ids": ends} if ends else {}),
        rope=rope,
        tie_embeddings=tied,
        dtype=dtype,
        mrope_sections=sections,
        vision=read_qwen3_vision(vision),
        image_id=fields.integer("image_token_id", Qwen3VLConfig.image_id),
        video_id=fields.integer("video_token_id", Qwen3VLConfig.video_id),
        start_id=fields.integer("vision_start_token_id", Qwen3VLConfig.start_id),
        end_id=fields.integer("vision_end_token_id", Qwen3VLConfig.end_id),
    )


def _read_mrope(fields: Fields) -> tuple[tuple[int, int, int], RopeConfig]:
    """The sections, and the rest as in text models."""
    rope = _rope_fields(fields)
    rope.fixed("mrope_interleaved", True)
    three = "three numbers of at least 0"
    sections = rope.take("mrope_section", three, lambda v: type(v) is list and len(v) == 3 and _are_counts(v))
    return tuple(sections), _read_rope(rope, 500_000.0)


def _are_counts(values: list) -> bool:
    return all(type(value) is int and 0 <= value < 2**12 for value in values)


def read_qwen3_vision(fields: Fields) -> Qwen3VisionConfig:
    """From Qwen3-VL's vision_config."""
    kinds = ("qwen3_vl_vision", "qwen3_vl", "qwen3_vl_moe_vision", "qwen3_vl_moe")  # those without _vision as published
    fields.choice("model_type", kinds, kinds[0])
    fields.fixed("hidden_act", "gelu_pytorch_tanh")
    fields.fixed("in_channels", 3)
    for name in ("dtype", "torch_dtype"):  # the whole model has one
        fields.left.pop(name, None)
    rope = Fields(_take_object(fields, "rope_parameters"))
    rope.fixed("rope_type", "axial")
    positions = fields.integer("num_position_embeddings", 48**2)
    config = Qwen3VisionConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("depth", most=2**12),
        num_heads=fields.integer("num_heads", most=2**12),
        out_size=fields.integer("out_hidden_size"),
        deepstack=tuple(
            fields.take("deepstack_visual_indexes", "a list of layers", lambda v: type(v) is list and _are_counts(v))
        ),
        position_side=math.isqrt(positions),
        patch_size=fields.integer("patch_size", 16, most=2**10),
        merge_size=fields.integer("spatial_merge_size", 2, most=2**6),
        frames=fields.integer("temporal_patch_size", 2, most=2**6),
        rope_base=rope.number("rope_theta", Qwen3VisionConfig.rope_base),
    )
    if config.position_side**2 != positions:
        raise ConfigError(f"num_position_embeddings ({positions}) is not a square")
    rope.finish()
    fields.finish()
    return config


# Fields with one supported value, as above. The tower's own pooling head is not part of Gemma-3.
SIGLIP = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3,
          "vision_use_head": False, "is_encoder_decoder": False, "add_cross_attention": False}  # fmt: skip


def read_siglip(fields: Fields, tokens_per_image: int) -> SiglipConfig:
    """From Gemma-3's vision_config; mm_tokens_per_image lies beside it."""
    for name, only in SIGLIP.items():
        fields.fixed(name, only)
    for name in (*HARMLESS.split(), "architectures", "dtype", "torch_dtype"):  # the whole model has one dtype
        fields.left.pop(name, None)
    config = SiglipConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", most=2**12),
        num_heads=fields.integer("num_attention_heads", most=2**12),
        image_size=fields.integer("image_size", most=2**14),
        patch_size=fields.integer("patch_size", most=2**14),
        norm_eps=fields.number("layer_norm_eps", SiglipConfig.norm_eps),
        tokens_per_image=tokens_per_image,
    )
    fields.finish()
    return config


def _read_single_rope(fields: Fields) -> RopeConfig:
    fields.fixed("partial_rotary_factor", 1.0)
    return _read_rope(_rope_fields(fields), RopeConfig.base)


def _rope_fields(fields: Fields) -> Fields:
    """From rope_parameters (transformers 5) or rope_theta and rope_scaling (4), which must agree."""
    sources = [_take_object(fields, name) for name in ("rope_parameters", "rope_scaling")]
    return _merged([{"rope_theta": fields.left.pop("rope_theta", None)}, *sources])


def _take_object(fields: Fields, name: str) -> dict[str, Any]:
    return fields.take(name, "an object", lambda v: type(v) is dict, {})


def _merged(sources: list[dict[str, Any]]) -> Fields:
    """Sources that state something twice must agree."""
    stated: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            name = "rope_type" if name == "type" else name
            if value is not None and stated.get(name) not in (None, value):
                raise ConfigError(f"{name} is given twice, as {stated[name]!r:.80} and as {value!r:.80}")
            stated[name] = value if stated.get(name) is None else stated[name]
    return Fields(stated)


def _read_rope(rope: Fields, default_base: float) -> RopeConfig:
    kind = rope.choice("rope_type", ROPE_KINDS, "default")
    base = rope.number("rope_theta", default_base)
    scaling = {name: rope.number(name) for name in ROPE_KINDS[kind] if not name.startswith("original")}
    if "original_max_position_embeddings" in ROPE_KINDS[kind]:
        scaling["original_max_positions"] = rope.integer("original_max_position_embeddings")
    rope.fixed("partial_rotary_factor", 1.0)
    rope.finish()
    return RopeConfig(base, kind, **scaling)


def _read_dtype(*parts: Fields) -> torch.dtype:
    """The one dtype that a config and its parts state, by dtype (transformers 5) or torch_dtype (4)."""
    known = [*DTYPES, *(f"torch.{name}" for name in DTYPES)]
    names = ("dtype", "torch_dtype")
    stated = {part.choice(name, known, "").removeprefix("torch."): name for part in parts for name in names}
    stated.pop("", None)
    if len(stated) > 1:
        raise ConfigError(" and ".join(f"{name} ({value})" for value, name in stated.items()) + " disagree")
    return DTYPES[next(iter(stated), "float32")]


def _read_ends(fields: Fields) -> tuple[int, ...]:
    def is_ids(value: Any) -> bool:
        return all(type(i) is int for i in (value if isinstance(value, list) else [value]))

    ends = fields.take("eos_token_id", "a token id or a list of token ids", is_ids, [])
    return tuple(ends) if isinstance(ends, list) else (ends,)


READERS: dict[str, Callable[[Fields], Config]] = {  # by config.json's model_type
    "llama": _read_llama,
    "gemma3_text": _read_gemma3_text,
    "gemma3": _read_gemma3,
    "qwen3": _read_qwen3,
    "qwen3_moe": partial(_read_qwen3, mixture=True),
    "qwen3_vl": _read_qwen3_vl,
    "qwen3_vl_moe": partial(_read_qwen3_vl, mixture=True),
}
