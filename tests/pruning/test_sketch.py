"""Sketches: how far apart sets of weights are, and what that decides about a calibrated plan."""

import dataclasses

import pytest
import torch
from support.cases import random_corrections
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_olmo2_config

import pop
from pop.pruning.sketch import EQUAL, MOST_DISTANCE, SKETCH_SIZE, distance, signs, sketch_of

CONFIG = tiny_config(hidden_size=64, head_dim=32)
LAYERS = (1, 3, 4)


def model_of(change=lambda weight: weight, config=CONFIG, dtype=torch.float32) -> pop.Model:
    """A random model whose matrices are changed."""
    module = random_model(config)
    for weight in module.parameters():
        if weight.dim() == 2:
            weight.data = change(weight.data)
    return pop.Model(module.to(dtype), config)


def calibrated(config=CONFIG) -> pop.PrunePlan:
    return pop.PrunePlan(LAYERS, 1, 1, random_corrections(config, LAYERS, 1, model=model_of(config=config)))


def rounded(bits: int):
    """Round to integers of some bits, with a scale for each block of 32."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((blocks / scale).round() * scale).view_as(weight)

    return change


def noisy(share: float):
    """Add noise of this share of the weights' standard deviation."""

    generator = torch.Generator().manual_seed(0)

    def change(weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        return weight + share * weight.std() * noise

    return change


def apart(model: pop.Model) -> float:
    return distance(model.sketch[list(LAYERS)], calibrated(model.config).corrections.sketch)


def test_the_signs_are_the_same_everywhere():
    assert signs(3, 0)[0].tolist() == [1.0, 1.0, 1.0]
    found = signs(1000, 1)
    assert found.shape == (SKETCH_SIZE, 1000) and found.dtype == torch.float32
    assert found.abs().eq(1).all() and found.mean().abs() < 0.03
    assert signs(64, 0).sum(1).int().tolist()[:8] == [4, 4, 8, -8, 0, -2, -14, -4]


def test_the_mean_square_is_that_of_the_weights():
    """E[(u' W h)^2] = |W|^2, within four standard errors of 64 numbers."""
    model = model_of()
    layer = model.module.layers[3]
    norm = layer.input_layernorm.weight
    squares = [(matrix.weight * norm).square().sum() for matrix in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    found = model.sketch[3].square().mean(1)
    torch.testing.assert_close(found, torch.stack(squares), rtol=4 * (2 / SKETCH_SIZE) ** 0.5, atol=0)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(CONFIG, torch.float16), *((c, torch.bfloat16) for c in (CONFIG, tiny_gemma3_config(), tiny_olmo2_config()))],
)
def test_another_dtype_is_the_same_model(config, dtype, capsys):
    model = model_of(config=config, dtype=dtype)
    assert 0 < apart(model) < EQUAL
    model.resolve(calibrated(config))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "about"), [(rounded(8), 0.006), (rounded(4), 0.1), (noisy(0.02), 0.02), (noisy(0.1), 0.1)]
)
def test_a_plan_of_near_weights_is_used_with_one_line(change, about, capsys):
    model = model_of(change)
    assert apart(model) == pytest.approx(about, rel=0.3)
    plan = dataclasses.replace(calibrated(), name="my.plan")
    for _ in range(2):  # the line comes once
        assert model.prefill([[1, 2, 3]], model.new_cache(), plan=plan).isfinite().all()
    (line,) = capsys.readouterr().err.splitlines()
    assert "my.plan" in line and f"{apart(model):.1%}" in line and "pop check" in line


@pytest.mark.parametrize(
    "change", [noisy(0.5), lambda weight: -weight, lambda weight: 2 * weight, lambda weight: torch.nan * weight]
)
def test_a_plan_of_other_weights_is_refused(change):
    model = model_of(change)
    assert not apart(model) <= MOST_DISTANCE
    with pytest.raises(pop.PlanError, match=r"other weights.*pop calibrate"):
        model.resolve(calibrated())
    for config in (CONFIG, tiny_config(hidden_size=64, head_dim=16), tiny_config(hidden_size=32, head_dim=32)):
        with pytest.raises(pop.PlanError, match="other weights"):
            pop.Model(random_model(config, seed=5), config, plan=calibrated())


def test_layers_outside_the_plan_do_not_count():
    model = model_of()
    model.module.layers[0].self_attn.k_proj.weight.data += 1
    model.module.layers[1].mlp.up_proj.weight.data += 1
    assert apart(model) == 0


def test_all_projections_and_norms_of_the_plan_s_layers_count():
    found = []
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "input_layernorm.weight"):
        model = model_of()
        model.module.layers[3].get_parameter(name).data *= 2
        found.append(apart(model))
    assert min(found) > EQUAL


def test_a_sketch_is_linear_and_any_order_of_the_heads_matters():
    keys_values = torch.randn(3, 2, 20, SKETCH_SIZE)
    double = sketch_of(2 * keys_values)
    torch.testing.assert_close(double, 2 * sketch_of(keys_values))
    assert distance(sketch_of(keys_values.flip(2)), sketch_of(keys_values)) > 1
