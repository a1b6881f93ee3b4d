"""Gemma-3's vision tower and projector: the reference's features, the published names and sizes, strict loading."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.tiny import random_weights
from support.tiny_images import random_bytes
from torch import nn

from pop.checkpoints.config_json import read_siglip
from pop.checkpoints.fields import Fields
from pop.checkpoints.weights import load_weights
from pop.errors import CheckpointError, ConfigError
from pop.models.config import SiglipConfig
from pop.models.vision.siglip import Projector, VisionTower

GOLDENS = Path(__file__).parents[1] / "goldens" / "vision"
CASES = json.loads((GOLDENS / "towers.json").read_text(encoding="utf-8"))["cases"]
FEATURES = np.load(GOLDENS / "towers.npz")
TOLERANCE = 1e-4  # of the standard deviation of the reference's features

# vision_config of Gemma-3 4b, 12b and 27b as published.
PUBLISHED = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}


class Eyes(nn.Module):
    """The vision part of a Gemma-3, as its names lay it out, without the language model."""

    def __init__(self, config: SiglipConfig, hidden_size: int):
        super().__init__()
        self.config = SimpleNamespace(head_dim=8, tie_embeddings=True, num_layers=0)  # what the loader asks of it
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config, hidden_size)


def tiny(name: str) -> tuple[Eyes, torch.Tensor]:
    """The model of a golden case, and its images [N, 3, S, S]."""
    case = CASES[name]
    config = read_siglip(Fields(dict(case["vision_config"])), case["mm_tokens_per_image"])
    eyes = Eyes(config, case["hidden_size"])
    eyes.load_state_dict(weights_of(eyes, case["seed"]))
    pictures = random_bytes(config.image_size, 2 * config.image_size, 3, case["seed"])
    pixels = torch.from_numpy(pictures).permute(2, 0, 1).float().sub(127.5).div(127.5)
    return eyes.requires_grad_(False).eval(), torch.stack(pixels.chunk(2, dim=2))


def weights_of(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    return random_weights({name: tuple(p.shape) for name, p in module.named_parameters()}, seed)


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest deviation from `expected`, in standard deviations of it."""
    assert found.shape == expected.shape
    return np.abs(found.float().numpy() - expected).max() / expected.std()


# ---- against the reference ----


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_references(name):
    eyes, pixels = tiny(name)
    patches = eyes.vision_tower(pixels)
    assert error(patches, FEATURES[f"{name}-patches"]) < TOLERANCE
    assert error(eyes.multi_modal_projector(patches), FEATURES[f"{name}-tokens"]) < TOLERANCE


def test_features_in_bfloat16_stay_in_it():
    eyes, pixels = tiny("pooled")
    tokens = eyes.bfloat16().multi_modal_projector(eyes.vision_tower(pixels.bfloat16()))
    assert tokens.dtype == torch.bfloat16
    assert error(tokens, FEATURES["pooled-tokens"]) < 0.1  # some 16 roundings of 2 ** -9


def test_images_do_not_see_each_other():
    eyes, pixels = tiny("odd-grid")
    together = eyes.multi_modal_projector(eyes.vision_tower(pixels))
    alone = eyes.multi_modal_projector(eyes.vision_tower(pixels[1:]))
    assert (together[1:] - alone).abs().max() < 1e-5
    assert eyes.vision_tower(pixels[:0]).shape == (0, 81, 25)


def test_pooling_is_the_mean_of_squares():
    eyes, _ = tiny("odd-grid")
    patches = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 81, 25)).astype(np.float32))
    expected = nn.functional.avg_pool2d(patches.transpose(1, 2).unflatten(2, (9, 9)), 3).flatten(2).transpose(1, 2)
    assert (eyes.multi_modal_projector.pool(patches) - expected).abs().max() < 1e-6


def test_attention_needs_no_mask_nor_score_matrix():
    """The tower must stay eligible for fused attention: 4096 patches' scores are 268 million numbers an image."""
    eyes, pixels = tiny("pooled")
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.scaled_dot_product_attention:
                calls.append((args, kwargs))
            return function(*args, **(kwargs or {}))

    with Watch():
        eyes.vision_tower(pixels)
    assert len(calls) == 3
    assert all(len(args) == 3 and not kwargs for args, kwargs in calls)


# ---- the published sizes and names ----


def text_parameters(vocab, layers, width, mlp, heads, kv_heads, head_width) -> int:
    """Of Gemma-3's language model, by hand: four norms, q and k norms, tied embeddings."""
    attention = width * head_width * (2 * heads + 2 * kv_heads) + 2 * head_width
    return vocab * width + layers * (attention + 3 * width * mlp + 4 * width) + width


@pytest.mark.parametrize(
    ("total", "text"),
    [
        (4_300_079_472, (262_208, 34, 2560, 10_240, 8, 4, 256)),
        (12_187_325_040, (262_208, 48, 3840, 15_360, 16, 8, 256)),
        (27_432_406_640, (262_208, 62, 5376, 21_504, 32, 16, 128)),
    ],
)
def test_parameter_counts(total, text):
    config = read_siglip(Fields(dict(PUBLISHED)), 256)
    with torch.device("meta"):
        eyes = Eyes(config, hidden_size=text[2])
    assert sum(p.numel() for p in eyes.parameters()) == total - text_parameters(*text)


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        eyes = Eyes(read_siglip(Fields(dict(PUBLISHED)), 256), hidden_size=2560)
    tower, layer = "vision_tower.vision_model.", "vision_tower.vision_model.encoder.layers.{}."
    expected = {
        f"{tower}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (1152,),
        f"{tower}embeddings.position_embedding.weight": (4096, 1152),
        f"{tower}post_layernorm.weight": (1152,),
        f"{tower}post_layernorm.bias": (1152,),
        "multi_modal_projector.mm_input_projection_weight": (1152, 2560),
        "multi_modal_projector.mm_soft_emb_norm.weight": (1152,),
    }
    parts = {f"self_attn.{part}": (1152, 1152) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    parts |= {"mlp.fc1": (4304, 1152), "mlp.fc2": (1152, 4304), "layer_norm1": (1152,), "layer_norm2": (1152,)}
    for n in range(27):
        for part, shape in parts.items():
            expected[layer.format(n) + part + ".weight"] = shape
            expected[layer.format(n) + part + ".bias"] = shape[:1]
    assert {name: tuple(p.shape) for name, p in eyes.named_parameters()} == expected


# ---- loading ----


SAVED_AS = {
    "published": lambda name: name,
    "transformers 5": lambda name: name.replace("vision_model.", ""),
    "prefixed": lambda name: f"model.{name}",
    "prefixed, without vision_model": lambda name: f"model.{name.replace('vision_model.', '')}",
}


@pytest.mark.parametrize("saved_as", SAVED_AS)
def test_loads_under_any_saved_name(tmp_path, saved_as):
    eyes, _ = tiny("pooled")
    weights = weights_of(eyes, seed=3)
    save_file({SAVED_AS[saved_as](name): w for name, w in weights.items()}, tmp_path / "model.safetensors")
    load_weights(tmp_path, eyes, dtype=torch.float32, device="cpu", progress=False)
    for name, parameter in eyes.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_wrong_weights_are_refused_by_name(tmp_path):
    eyes, _ = tiny("pooled")
    weights = weights_of(eyes, seed=3)
    weights["vision_tower.head.probe"] = torch.zeros(1, 1, 24)
    weights["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(25)
    del weights["multi_modal_projector.mm_soft_emb_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, eyes, dtype=torch.float32, device="cpu", progress=False)
    for part in (
        "missing: multi_modal_projector.mm_soft_emb_norm.weight",
        "surplus: vision_tower.vision_model.head.probe",
        "vision_tower.vision_model.post_layernorm.bias is [25], not [24]",
    ):
        assert part in str(caught.value)


# ---- the config ----


def test_published_config():
    assert read_siglip(Fields(dict(PUBLISHED)), 256) == SiglipConfig(1152, 4304, 27, 16, 896, 14, 1e-6, 256)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 1150}, "not a multiple of num_attention_heads"),
        ({"image_size": 900}, "not a multiple of patch_size"),
        ({"image_size": [896, 896]}, "image_size must be an integer"),
        ({"patch_size": 16}, "not the square of a divisor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'gelu_pytorch_tanh'"),
        ({"num_channels": 1}, "num_channels must be 3"),
        ({"model_type": "clip_vision_model"}, "model_type must be 'siglip_vision_model'"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be a positive number"),
    ],
)
def test_bad_configs_are_refused(change, pattern):
    fields = {**PUBLISHED, **change}
    if "patch_size" in change:  # 56 patches a side: 16 tokens do not divide them
        assert fields["image_size"] % fields["patch_size"] == 0
    with pytest.raises(ConfigError, match=pattern):
        read_siglip(Fields(fields), 256)


@pytest.mark.parametrize("tokens", [257, 1024 * 3, 81])
def test_bad_token_counts_are_refused(tokens):
    with pytest.raises(ConfigError, match=f"mm_tokens_per_image \\({tokens}\\) is not the square of a divisor"):
        read_siglip(Fields(dict(PUBLISHED)), tokens)
