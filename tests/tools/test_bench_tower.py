"""The FLOPs of vision towers, against what torch counts, and how they cap the speedup."""

import pytest
import torch
from support.published_vl import published
from support.tiny import patch_values, random_model, tiny_gemma3_vl_config, tiny_qwen3_vl_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pop.models.vision.qwen3_vl import Grid
from pop.pruning import cost
from pop.pruning.plan import PrunePlan
from tools.bench.tower import speedup_limit, vision_flops


def test_the_tower_is_counted_as_torch_counts_it():
    """Images of two sizes and a video of three frame pairs. Frame pairs do not attend each other."""
    config = tiny_qwen3_vl_config()
    tower = random_model(config).model.visual
    grids = [Grid(1, 4, 6), Grid(1, 2, 8), Grid(3, 4, 6)]
    patches = [24, 16, 24, 24, 24]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(sum(patches), patch_values(config.vision)), grids)
    assert counter.get_total_flops() == vision_flops(config, patches)


def test_gemmas_tower_is_counted_as_torch_counts_it():
    config = tiny_gemma3_vl_config()
    module = random_model(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.image_features(torch.zeros(2, 3, 28, 28))
    assert counter.get_total_flops() == vision_flops(config, [16, 16])


def test_the_tower_caps_what_pruning_gains():
    """A third of Qwen3-VL-8B is pruned. A text gains 1.47x, and a prompt with an image of 640 x 480 pixels less."""
    config, plan = published("8b"), PrunePlan.deepest(36, 1 / 3)
    text, patches = cost.speedup_limit(config, 366, plan), [1200]
    assert round(text, 2) == 1.47
    tower = vision_flops(config, patches)
    share = tower / (tower + cost.prefill_flops(config, 366, PrunePlan.none()))
    assert round(share, 2) == 0.20
    limit = speedup_limit(config, 366, plan, patches)
    assert limit == pytest.approx(1 / (share + (1 - share) / text)) and round(limit, 2) == 1.34
