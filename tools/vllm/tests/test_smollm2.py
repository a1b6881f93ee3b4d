"""A real model and the plan that ships for it."""

import dataclasses
from pathlib import Path

import pytest
from engines import Engine

import pop
from pop import PrunePlan, WeightsNotFound
from pop.checkpoints import registry

TEXT = sorted((Path(pop.__file__).parent / "data" / "calibration").glob("*.txt"))[0]


@pytest.fixture
def engine():
    try:
        folder = registry.find_weights("smollm2-135m")
    except WeightsNotFound as error:
        pytest.skip(str(error))
    return Engine(folder, kv_cache_memory_bytes=256 << 20)


@pytest.mark.parametrize(("budget", "selecting_layer"), [(256, 8), (64, 18)])
def test_the_plan_of_14_layers_equals_the_reference(engine, budget, selecting_layer):
    """Corrections, updates, sinks, the last tokens and selected ones, all in one plan.

    A prompt in chunks needs a selecting layer after which only the deepest layers are pruned, which the plan's is not.
    """
    shipped = PrunePlan.load("smollm2-135m-14")
    assert shipped.selecting_layer == 8
    short = {"full_depth_below": 0, "full_depth_last": 96, "full_depth_selected": 0.05}  # as the prompts are
    plan = dataclasses.replace(shipped, selecting_layer=selecting_layer, **short)
    ids = pop.load_tokenizer(engine.folder).encode(TEXT.read_text(encoding="utf-8")[:10_000])
    prompts = [ids[:40], ids[100:240]]
    assert plan.num_selected(len(prompts[1]) - 96 - 1) == 2
    engine.use(plan, budget=budget)
    engine.assert_equal(engine.generate(prompts), prompts, plan)
