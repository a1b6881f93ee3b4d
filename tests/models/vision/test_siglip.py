"""Gemma-3's vision tower and projector: the reference's features."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.goldens import GOLDENS, TOLERANCE, error
from support.published import GEMMA3_TEXTS, gemma3_with_images
from support.tiny import random_weights
from support.tiny_images import random_bytes
from support.torch_calls import calls_of
from torch import nn

from pop.checkpoints.config_json import read_config
from pop.models.config import SiglipConfig
from pop.models.vision.siglip import Projector, VisionModel

CASES = json.loads((GOLDENS / "vision" / "towers.json").read_bytes())["cases"]
FEATURES = np.load(GOLDENS / "vision" / "towers.npz")


class Vision(nn.Module):
    """The vision part of a Gemma-3 under its published names, without the language model."""

    def __init__(self, config: SiglipConfig, hidden_size: int):
        super().__init__()
        self.vision_tower = VisionModel(config)
        self.multi_modal_projector = Projector(config, hidden_size)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """read(vision_config, tokens an image) -> SiglipConfig, from the config.json of a Gemma-3."""
    folder = tmp_path_factory.mktemp("gemma3")

    def write_and_read(vision_config: dict, tokens: int = 256) -> SiglipConfig:
        fields = gemma3_with_images(GEMMA3_TEXTS["4b"], vision_config=vision_config, mm_tokens_per_image=tokens)
        (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return read_config(folder).vision

    return write_and_read


def tiny(read, name: str) -> tuple[Vision, torch.Tensor]:
    """The model of a golden case, and its images [N, 3, S, S]."""
    case = CASES[name]
    config = read(case["vision_config"], case["mm_tokens_per_image"])
    vision = Vision(config, case["hidden_size"])
    shapes = {name: tuple(parameter.shape) for name, parameter in vision.named_parameters()}
    vision.load_state_dict(random_weights(shapes, case["seed"]))
    pictures = random_bytes(config.image_size, 2 * config.image_size, 3, case["seed"])
    pixels = torch.from_numpy(pictures).permute(2, 0, 1).float().sub(127.5).div(127.5)
    return vision.requires_grad_(False).eval(), torch.stack(pixels.chunk(2, dim=2))


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_references(read, name):
    vision, pixels = tiny(read, name)
    patches = vision.vision_tower(pixels)
    assert error(patches, FEATURES[f"{name}-patches"]) < TOLERANCE
    assert error(vision.multi_modal_projector(patches), FEATURES[f"{name}-tokens"]) < TOLERANCE


def test_attention_needs_no_mask_and_patches_no_convolution(read):
    """The scores of 4096 patches are 268 million numbers an image. On a GPU, cuDNN would round to TF32 in float32."""
    vision, pixels = tiny(read, "pooled")
    _, called = calls_of(vision.vision_tower, pixels)
    assert not [function for function, *_ in called if "conv" in getattr(function, "__name__", "")]
    attended = [(len(args), kwargs) for function, args, kwargs in called if function is F.scaled_dot_product_attention]
    assert attended == [(3, {})] * 3
