"""A real model and the plan that ships for it."""

import pytest
from engines import Engine

import pop
from pop import PrunePlan, WeightsNotFound
from pop.checkpoints import registry


@pytest.fixture(scope="module")
def engine():
    try:
        folder = registry.find_weights("smollm2-135m")
    except WeightsNotFound as error:
        pytest.skip(str(error))
    return Engine(folder, kv_cache_memory_bytes=256 << 20)


@pytest.mark.parametrize("budget", [2048, 128])
def test_the_plan_of_14_layers_equals_the_reference(engine, budget):
    """Corrections, updates, sinks, the last tokens and selected ones, all in one plan."""
    plan = PrunePlan.load("smollm2-135m-14")
    engine.model.weights.check(plan)
    text = "The code of the red box is 52817. " + "The box is red. " * 80 + "The code of the red box is"
    ids = pop.load_tokenizer(registry.find_weights("smollm2-135m")).encode(text)
    prompts = [ids[-40:], ids[:130], ids]
    engine.use(plan, budget)
    engine.assert_equal(engine.generate(prompts), prompts, plan)
