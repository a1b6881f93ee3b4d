"""Gemma-3 checkpoints with images: the names that their weights may have, and weights that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import write_weights
from support.tiny_images import random_bytes

import pop
from pop.errors import CheckpointError

A = random_bytes(30, 50, 3, seed=1)
OLD, NEW = "language_model.model.", "model.language_model."
SAVED_AS = {
    "published": lambda name: name,
    "prefixed": lambda name: name.replace(OLD, NEW) if name.startswith("language_model") else f"model.{name}",
    "bare": lambda name: name.replace(OLD, "language_model.").replace("vision_model.", ""),
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, its weights by their published names."""
    vision = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"vocab_size": 67, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 3, "sliding_window": 5}
    config = {
        "model_type": "gemma3",
        "text_config": {**text, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        "vision_config": {**vision, "image_size": 28, "patch_size": 7},
        "mm_tokens_per_image": 4,
        **{"boi_token_index": 64, "eoi_token_index": 65, "image_token_index": 66},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path, pop.checkpoints.config_json.read_config(tmp_path), seed=3)
    return tmp_path


def logits(folder):
    return pop.load(folder, prune=None).logits([[2, 64, 66, 66, 66, 66, 65, 9]], images=[A])


@pytest.mark.parametrize("saved_as", SAVED_AS)
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
def test_loads_under_any_saved_name(folder, saved_as, head):
    expected = logits(folder)
    weights = load_file(folder / "model.safetensors")
    saved = {SAVED_AS[saved_as](name): weight for name, weight in weights.items()}
    assert saved_as == "published" or not saved.keys() & weights.keys() & {"language_model.model.norm.weight"}
    if head:
        saved[head] = weights[f"{OLD}embed_tokens.weight"].clone()
    save_file(saved, folder / "model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_wrong_weights_are_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if ".layers.2." not in name or "vision" in name}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="num_hidden_layers is 3 but 2 layers are stored; missing: language_mod"):
        pop.load(folder)


def test_a_head_that_is_not_the_embedding_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(67, 30)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight should repeat language_model.model.embed_tokens.weight"):
        pop.load(folder)
