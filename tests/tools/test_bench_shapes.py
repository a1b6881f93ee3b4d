"""What tools/bench counts from shapes, by hand; and the random models, plans and weights that it measures."""

import dataclasses
import json

import pytest
import torch
from support.tiny import tiny_config, tiny_gemma3_config, tiny_model

import pop
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config
from pop.models.config import SiglipConfig
from tools.bench import shapes
from tools.bench.subject import parse_plan


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_known_shapes_have_the_registrys_parameters(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shapes.SHAPES[name]))
    config = read_config(tmp_path)
    assert config.dtype == torch.bfloat16
    if name == "gemma3-12b":  # the shape is the language model; the registry counts the vision tower
        config = dataclasses.replace(config, vision=SiglipConfig(1152, 4304, 27, 16, image_size=896, patch_size=14))
    assert shapes.weight_bytes(config, torch.bfloat16) == 2 * registry.MODELS[name].parameters


@pytest.mark.parametrize("tied", [False, True])
def test_decode_reads_all_weights_but_an_untied_embedding(tied):
    """V 67, D 30, I 44, L 5, H 6, K 2, E 10, counted by hand."""
    config = tiny_config(tie_embeddings=tied)
    layer = 30 * 60 + 2 * 30 * 20 + 60 * 30 + 3 * 30 * 44 + 2 * 30  # q, k and v, o, MLP, norms
    read = 5 * layer + 30 + 67 * 30 + (0 if tied else 30)  # ..., last norm, head, the token's row of the embedding
    cache = 5 * 2 * 9 * 20
    assert shapes.decode_bytes(config, 9, torch.bfloat16) == 2 * (read + cache)


def test_windows_in_bytes_by_hand():
    config = tiny_gemma3_config(windows=(5, 5, None))
    of_layer = 2 * 2 * 10 * 2  # a slot's bytes
    read = shapes.weight_bytes(config, torch.bfloat16)
    assert shapes.decode_bytes(config, 9, torch.bfloat16) == read + (5 + 5 + 9) * of_layer
    assert shapes.decode_bytes(config, 4, torch.bfloat16) == read + 3 * 4 * of_layer


@pytest.mark.parametrize("config", [tiny_config(num_layers=9), tiny_gemma3_config(windows=(5, None) * 4 + (5,))])
def test_as_many_layers_as_fit(config):
    def needed(layers):
        shorter = shapes.shortened(config, layers)
        assert shorter.windows == config.windows[:layers]
        prefill = shapes.prefill_memory(shorter, 20, torch.float32, True)
        return prefill + (layers * 2 * 20 * 15 + 2 * 30 * 15) * 4 + shapes.BIG  # corrections with codes of 15

    assert shapes.fitting_layers(config, 20, torch.float32, 10**12) == 9
    for layers in (1, 4, 8):
        free = needed(layers) / 0.9
        assert shapes.fitting_layers(config, 20, torch.float32, free + 1) == layers
    with pytest.raises(pop.InputError, match=f"one layer of .* needs {needed(1):,} bytes"):
        shapes.fitting_layers(config, 20, torch.float32, needed(1) / 0.9 - 1)


def test_plans_of_the_command_line():
    model = tiny_model(tiny_config(), compile=False)
    plan = parse_plan("corrected:0.5:3", model)
    assert (plan.layers, plan.full_depth_last, plan.full_depth_first) == ((3, 4), 3, 1)
    assert plan.corrections.weight.shape == (2, 2, 20, 15) and plan.corrections.update is None
    assert parse_plan("third", model) == pop.PrunePlan((4,))
    assert parse_plan("third:7:0.25:2", model) == pop.PrunePlan(
        (4,), full_depth_last=7, full_depth_selected=0.25, selecting_layer=2
    )
    model.plan = pop.PrunePlan((2,))
    assert parse_plan("default", model) == pop.PrunePlan((2,))
    assert model.prefill([[1, 2, 3, 4, 5]], model.new_cache(1, 8), plan=plan).isfinite().all()
