"""Compiled prefill and decode equal eager, never compile again once warm, and fall back where nothing compiles."""

import copy
import dataclasses
import logging
import random
from functools import partial
from itertools import chain
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_close, batches, plans, randn, random_corrections
from support.compiler import requires_compiler, requires_new_torch
from support.nightly import NIGHTLY
from support.tiny import (
    EXPERTS,
    patch_values,
    random_model,
    random_patches,
    tiny_config,
    tiny_gemma3_config,
    tiny_gemma3_vl_config,
    tiny_model,
    tiny_qwen3_vl_config,
)
from support.tiny_images import both_ways, random_bytes

import pop
from pop import engine
from pop.engine import two_phases
from pop.engine.cache import KVCache
from pop.inputs.processors import Prepared
from pop.models.images import Images
from pop.models.vision.qwen3_vl import Grid

pytestmark = pytest.mark.usefixtures("small_query_blocks")

PROMPT = 40  # tokens, at most
RANK = 9  # of corrections
# Compiling takes most of the time here, so only nightly runs compile everything that these tests can.
QWEN = partial(tiny_qwen3_vl_config, experts=EXPERTS)


@pytest.fixture(
    scope="module",
    params=[QWEN, tiny_gemma3_config],
    ids=lambda config: config(max_positions=6000).family,
)
def pair(request):
    """One model twice, compiled and eager, and how many rows the compiled one is warm for."""
    module = random_model(request.param(max_positions=6000), seed=5)
    plain = pop.PrunePlan((0,))
    compiled, eager = (pop.Model(module, module.config, plan=plain, compile=it, chunk_size=16) for it in (True, False))
    rows = 4 if NIGHTLY or module.config.family == "qwen3_vl" else 1
    corrections = random_corrections(module.config, (1, 3), 1, RANK, compiled)
    shares = {"full_depth_first": 1, "full_depth_selected": 0.3, "full_depth_below": 300}
    compiled.warmup(rows, [pop.PrunePlan((1, 3), corrections=corrections, **shares)])
    return compiled, eager, rows


# Whatever would compile raises.
no_compiling = partial(torch.compiler.set_stance, "fail_on_recompile")


@pytest.fixture
def nothing_compiles():
    with no_compiling():
        yield


@requires_compiler
@given(st.data())
def test_compiled_equals_eager_and_never_compiles_again(pair, data):
    """For any plan, batch, padding, chunk and cache, logits are within 1e-4 of their scale, and all graphs exist."""
    compiled, eager, max_rows = pair
    plan = data.draw(plans(compiled.config))
    if plan.corrections is not None:
        corrections = random_corrections(compiled.config, plan.layers, -1, RANK, compiled)
        plan = dataclasses.replace(plan, corrections=corrections)
    tokens, lengths = data.draw(batches(60, max_rows=max_rows, max_tokens=PROMPT))  # ids that are text
    slots = PROMPT + 8 + data.draw(st.integers(0, 9))
    chunk = data.draw(st.sampled_from([1, 2, 7, 16, 100]))
    choices, select, results = [], two_phases.select, []

    def choose(*args):  # scores may be equal up to rounding, so the second model takes what the first one has selected
        return choices.pop(0) if model is eager else choices.append(select(*args)) or choices[-1]

    with no_compiling(), patch.object(two_phases, "select", choose):
        for model in (compiled, eager):
            options = {"dtype": torch.float32, "device": torch.device("cpu"), "chunk_size": chunk}
            cache = KVCache(model.config, len(tokens), slots, **options)
            logits = [model.prefill(tokens, cache, lengths=lengths, plan=plan)]
            logits += [model.decode(tokens[:, 0], cache) for _ in range(4)]  # the third one is repeated work
            logits.append(model.prefill(tokens[:, :3], cache, plan=plan))  # the next turn of a conversation
            results.append(torch.stack(logits))
    assert_close(*results)


@requires_compiler
def test_a_long_cache_needs_no_new_graph(pair, nothing_compiles):
    """Each layer and each batch row has its own random keys and values, the same in both models' caches."""
    compiled, eager, max_rows = pair
    for rows in {1, max_rows}:
        logits = []
        for model in (compiled, eager):
            cache, drawn = model.new_cache(rows, 5000), torch.Generator().manual_seed(0)
            cache.lengths[:] = 4500
            for part in (*cache.keys, *cache.values):
                part[:, :4500] = torch.randn(part[:, :4500].shape, generator=drawn)
            logits.append(model.decode([5] * rows, cache))
        assert_close(*logits)


@requires_compiler
def test_a_long_prompt_whose_tokens_are_selected_needs_no_new_graph(pair, nothing_compiles):
    """Inductor adds up more than 4,096 numbers of float32 in another way."""
    compiled, eager, _ = pair
    last = compiled.config.num_layers - 1
    plan = pop.PrunePlan((last,), full_depth_selected=0.01, selecting_layer=last - 1)
    tokens = torch.randint(60, (1, 4100), generator=torch.Generator().manual_seed(0))
    assert_close(*(model.prefill(tokens, model.new_cache(1, 5000), plan=plan) for model in (compiled, eager)))


@requires_compiler
def test_answers_and_scores_compile_nothing_for_any_prompt_or_setting(pair, nothing_compiles):
    """Rows differ in length and their answers end at different times, sampled or greedy, as in the eager model."""
    compiled, eager, max_rows = pair
    drawn = random.Random(0)
    for count, settings in ((1, {}), (3, {"temperature": 0.8, "top_k": 9, "seed": 3}), (4, {"top_p": 0.5, "seed": 1})):
        rows = range(min(count, max_rows))
        prompts = [[drawn.randrange(60) for _ in range(drawn.choice([1, 2, 17, 33]))] for _ in rows]
        answers = [model.generate(prompts, max_new_tokens=9, **settings) for model in (compiled, eager)]
        assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]]
    for length in (1, 2, 30):
        scores = [model.score([5, 6, 7], [8, 9, 10] * length) for model in (compiled, eager)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    for rows in {1, max_rows}:
        prompts = [[5]] * rows  # with a cache for one token a row
        answers = [model.generate(prompts, max_new_tokens=1) for model in (compiled, eager)]
        assert [answer.tokens for answer in answers[0]] == [answer.tokens for answer in answers[1]]


@requires_compiler
def test_images_need_no_new_graph(pair, nothing_compiles):
    """Text alone warms the graphs up, whatever images bring.

    A chunk with look-ahead takes the graph of a filled cache, even if the cache is empty. A chunk with DeepStack and
    positions on three axes takes the graphs of text.
    """
    compiled, eager, max_rows = pair
    for rows, plan in ((1, pop.PrunePlan.none()), (2, pop.PrunePlan((0, 1, 3))), (1, pop.PrunePlan((1, 3), 4))):
        rows = min(rows, max_rows)
        tokens, lengths = torch.arange(rows * 20).view(rows, 20), torch.full((rows,), 20)
        numbers = torch.full((rows, 20), -1)
        numbers[:, 3:9], numbers[-1, 12:18] = torch.arange(6), torch.arange(6, 12)
        features, *deepstack = randn(3, 12, 30, seed=1)
        if compiled.config.family == "gemma3":
            images = both_ways(features.view(2, 6, 30), numbers)
        else:
            positions = torch.randint(30, (3, rows, 20), generator=torch.Generator().manual_seed(2))
            images = Images(features, numbers, rope_positions=positions, deepstack=tuple(deepstack))
        results = []
        for model in (compiled, eager):
            cache, stages = model.new_cache(rows, 64), model._stages(rows, plan)
            logits = engine.prefill(model.module, tokens, cache, lengths, plan, 16, stages, images)
            results.append(torch.stack([logits, model.decode([5] * rows, cache)]))
        assert_close(*results)


@requires_new_torch
@requires_compiler
@pytest.mark.parametrize("config", [tiny_qwen3_vl_config(), tiny_gemma3_vl_config()])
def test_a_towers_layers_are_compiled_for_images_of_any_size(config, monkeypatch):
    """The warm-up runs without images. Then one image, and several of one or more sizes, equal eager."""
    compile, towers = torch.compile, []

    def compile_tower(function, **options):  # and not the language model, to save time
        if function.__name__ != "vision_block":
            return function
        towers.append(function)
        return compile(function, **options)

    monkeypatch.setattr(torch, "compile", compile_tower)
    module = random_model(config, seed=3)
    compiled, eager = (pop.Model(module, config, plan=0.5, compile=it) for it in (True, False))
    compiled.warmup(1)
    if config.family == "qwen3_vl":
        grids = [Grid(1, 4, 6), Grid(1, 4, 6), Grid(1, 2, 8)]
        values = patch_values(config.vision)
        pixels = [random_patches(grid.rows * grid.columns, values, seed) for seed, grid in enumerate(grids)]
        ids = [[62, *[60] * (len(patches) // 4), 63] for patches in pixels]
        images = [Prepared("image", *one) for one in zip(pixels, zip(ids, strict=True), grids, strict=True)]
    else:
        (images,) = compiled.vision.prepare_batch([random_bytes(20, 30, 3, seed) for seed in range(3)], None, 1)
    for count in (1, 2, 3):
        pieces = [piece for one in images[:count] for piece in one.pieces if not isinstance(piece, str)]
        tokens = [5, *chain.from_iterable(pieces), 6]
        with no_compiling():
            ours = compiled.prefill([tokens], compiled.new_cache(), images=images[:count])
        assert_close(ours, eager.prefill([tokens], eager.new_cache(), images=images[:count]))
    assert towers


@requires_compiler
def test_no_graph_break_and_few_graphs(monkeypatch):
    """Each stage is one graph (fullgraph) with a handful of versions, whatever the number of layers."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs, but no code from them
    torch._dynamo.utils.counters.clear()
    heads = 9  # as many as the smallest prompts have slots
    module = random_model(tiny_config(num_layers=11, num_heads=heads, num_kv_heads=heads), seed=1)
    model = pop.Model(module, module.config, compile=True, plan=0.5)
    model.warmup(1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 10
    assert not torch._dynamo.utils.counters["graph_break"]
    with no_compiling():
        for length in (20, 21):
            assert len(model.generate([1] * length, max_new_tokens=4).tokens) == 4


@requires_compiler
def test_a_compiled_model_can_be_copied(pair):
    compiled, eager, _ = pair
    twin = copy.deepcopy(compiled)
    assert twin.generate([3, 4, 5], max_new_tokens=4).tokens == eager.generate([3, 4, 5], max_new_tokens=4).tokens


def test_tiny_models_run_eagerly_by_default():
    assert not tiny_model(tiny_config()).compiled


def test_where_nothing_compiles_auto_logs_it_once_and_true_is_refused(monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("no compiler\n  and a long story")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr("pop.runner.SMALLEST_COMPILED", 0)
    module = random_model(tiny_config(), seed=1)
    model, eager = pop.Model(module, module.config), pop.Model(module, module.config, compile=False)
    with caplog.at_level(logging.WARNING):
        model.warmup()
        answer = model.generate([1, 2, 3], max_new_tokens=2)
    assert not model.compiled
    assert answer.tokens == eager.generate([1, 2, 3], max_new_tokens=2).tokens
    (record,) = caplog.records
    assert "RuntimeError: no compiler and a long story" in record.getMessage()
    with pytest.raises(pop.UnsupportedError, match="RuntimeError: no compiler and a long story"):
        pop.Model(module, module.config, compile=True).warmup()


def test_two_models_share_no_compiled_code(monkeypatch):
    """torch keeps a few versions of each code object. A second model must not use up those of the first."""
    codes = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: codes.append(function.__code__) or function)
    for seed in (1, 2):
        module = random_model(tiny_config(), seed)
        pop.Model(module, module.config, compile=True).warmup()
    assert len({id(code) for code in codes}) == len(codes) > 2
