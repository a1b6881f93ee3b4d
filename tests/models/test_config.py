"""Sizes that contradict each other. Errors name the fields of config.json and their values."""

import dataclasses

import pytest
from support.tiny import (
    EXPERTS,
    tiny_config,
    tiny_gemma3_config,
    tiny_gemma3_vl_config,
    tiny_olmo2_config,
    tiny_qwen3_config,
    tiny_qwen3_vl_config,
)

from pop.errors import ConfigError
from pop.models.config import RopeConfig

GEMMA3_VL, QWEN3_VL = tiny_gemma3_vl_config(), tiny_qwen3_vl_config()
ALL = (tiny_config(), tiny_gemma3_config(), tiny_qwen3_config(), tiny_olmo2_config(), QWEN3_VL)


@pytest.mark.parametrize(
    ("config", "change", "named"),
    [
        *((config, {"num_heads": 5}, ["num_attention_heads (5)", "(2)"]) for config in ALL),
        *((config, {"head_dim": 9}, ["head_dim (9)"]) for config in ALL),
        *((config, {"bos_id": 67}, ["[67]", "vocab_size 67"]) for config in ALL),
        *((config, {"eos_ids": (-1, 3)}, ["[-1]", "vocab_size 67"]) for config in ALL),
        *((GEMMA3_VL, {name: 67}, [f"{name} (67)", "vocab_size 67"]) for name in ("image_id", "boi_id", "eoi_id")),
        (EXPERTS, {"per_token": 9}, ["num_experts_per_tok (9)", "num_experts (7)"]),
        (GEMMA3_VL.vision, {"hidden_size": 25}, ["hidden_size (25)", "num_attention_heads (3)"]),
        (GEMMA3_VL.vision, {"image_size": 29}, ["image_size (29)", "patch_size (7)"]),
        *((GEMMA3_VL.vision, {"tokens_per_image": n}, [f"mm_tokens_per_image ({n})", "(4)"]) for n in (5, 9)),
        (QWEN3_VL.vision, {"hidden_size": 25}, ["hidden_size (25)", "num_heads (3)"]),
        (QWEN3_VL.vision, {"hidden_size": 30}, ["hidden_size (30)", "num_heads (3)"]),
        *((QWEN3_VL.vision, {"deepstack": layers}, [str(list(layers))]) for layers in ((3, 1), (1, 1), (1, 4))),
        (QWEN3_VL, {"mrope_sections": (2, 2, 2)}, ["mrope_section [2, 2, 2]", "head_dim (10)"]),
        (QWEN3_VL, {"hidden_size": 32}, ["out_hidden_size (30)", "(32)"]),
        (QWEN3_VL, {"num_layers": 1}, ["deepstack_visual_indexes", "2 layers", "1"]),
        (QWEN3_VL, {"video_id": 60}, ["[60, 60, 62, 63]"]),
        (QWEN3_VL, {"end_id": 67}, ["[60, 61, 62, 67]", "vocab_size 67"]),
        (RopeConfig(), {"factor": 0.5}, ["factor", "0.5"]),
        (RopeConfig(), {"low_freq_factor": 4.0}, ["high_freq_factor (4.0)", "low_freq_factor (4.0)"]),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(config, change, named):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, **change)
    for part in named:
        assert part in str(caught.value)
