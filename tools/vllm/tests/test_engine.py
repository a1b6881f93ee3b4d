"""vLLM's engine with the plugin computes what pop's reference computes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from engines import BLOCK, calibrated, error, prompts_of
from pop_vllm.attention import RowAttention, without_graphs
from pop_vllm.metrics import INTERVAL
from pop_vllm.step import Kept
from pop_vllm.weights import check_weights
from prometheus_client import REGISTRY
from vllm.config.compilation import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn

from pop import PlanError, PrunePlan
from pop.pruning.corrections import Corrections

LENGTHS = (3, 97, 40, 130)
PLANS = {
    "none": lambda engine: PrunePlan.none(),
    "deepest": lambda engine: PrunePlan((3, 4, 5)),
    "gaps": lambda engine: PrunePlan((1, 3, 5), full_depth_last=4, full_depth_first=2),
    "calibrated": lambda engine: calibrated(engine, (3, 4, 5), full_depth_last=32),
    "updates": lambda engine: calibrated(engine, (1, 3, 4), full_depth_last=8),
    "selecting": lambda engine: PrunePlan((3, 4, 5), full_depth_last=4, full_depth_selected=0.2),
    "long": lambda engine: calibrated(engine, (3, 4, 5), full_depth_selected=0.2, full_depth_below=60),
    "all": lambda engine: calibrated(engine, (1, 4, 5), full_depth_last=8, full_depth_selected=0.2, selecting_layer=3),
}

on_llama = pytest.mark.parametrize("engine", ["LlamaForCausalLM"], indirect=True)


def has_windows(engine) -> bool:
    return any(window is not None for window in engine.pop.config.windows)


def assert_equals_the_reference(engine, plan, budget):
    """Steps mix prompts, chunks of prompts, and requests that decode."""
    engine.use(plan, budget)
    prompts = prompts_of(LENGTHS)
    engine.assert_equal(engine.generate(prompts), prompts, plan)


@pytest.mark.parametrize("budget", [2048, 50])
@pytest.mark.parametrize("name", ["gaps", "all"])
def test_each_family_equals_the_reference(engine, name, budget):
    """In chunks, and if layers have windows, only tokens of the last chunk can be selected."""
    plan = PLANS[name](engine)
    if budget == 50 and has_windows(engine):
        plan = dataclasses.replace(plan, full_depth_selected=0.0, selecting_layer=None)
    assert_equals_the_reference(engine, plan, budget)


@on_llama
@pytest.mark.parametrize("budget", [2048, 50])
@pytest.mark.parametrize("name", ["none", "deepest", "calibrated", "updates", "selecting", "long"])
def test_each_kind_of_plan_equals_the_reference(engine, name, budget):
    assert_equals_the_reference(engine, PLANS[name](engine), budget)


@on_llama
def test_a_selecting_plan_whose_pruned_layers_kept_ones_follow(engine):
    """Prompts in one step select among all their tokens."""
    assert_equals_the_reference(engine, calibrated(engine, (1, 3, 4), full_depth_selected=0.2), 2048)


@on_llama
@pytest.mark.parametrize("is_calibrated", [True, False])
@pytest.mark.parametrize(("layers", "is_deepest"), [((3, 4, 5), True), ((1, 3, 4), False)])
def test_the_log_says_what_a_plan_does_and_what_it_cannot(engine, layers, is_deepest, is_calibrated, monkeypatch):
    said, warned = [], []
    monkeypatch.setattr("pop_vllm.model.logger.info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr("pop_vllm.model.logger.warning", warned.append)
    make = calibrated if is_calibrated else lambda _, layers, **fields: PrunePlan(layers, **fields)
    engine.use(make(engine, layers, full_depth_selected=0.2, selecting_layer=2), 2048)
    engine.llm.apply_model(lambda module: module.announce("my.plan"))
    assert said == ["pop: POP_PLAN is my.plan: 3 of 6 layers, for prompts of 0 tokens or more"]
    assert any("is not calibrated" in line for line in warned) != is_calibrated
    assert not any("does not hold" in line for line in warned)
    assert any("its last chunk only" in line for line in warned) != is_deepest


@on_llama
def test_the_log_says_that_a_plan_does_not_hold(engine, monkeypatch):
    said, warned = [], []
    monkeypatch.setattr("pop_vllm.model.logger.info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr("pop_vllm.model.logger.warning", warned.append)
    for holds, kept in ((True, [0.9, 0.8, 1.0]), (False, None), (False, [0.9, 0.8, 1.0])):
        about = {"verdict": {"holds": holds, "kept": kept}}
        engine.use(dataclasses.replace(calibrated(engine, (3, 4, 5)), about=about), 2048)
        engine.llm.apply_model(lambda module: module.announce("my.plan"))
        assert any("does not hold" in line for line in warned) != holds
        warned.clear()
    assert "tokens or more, keeps 90% [80%, 100%] of pop check's answers, but does not hold" in said[-1]


@pytest.mark.parametrize("budget", [2048, 33])
@pytest.mark.parametrize("name", ["deepest", "calibrated"])
def test_a_prefix_from_the_cache_ends_before_the_full_depth_tokens(engine, name, budget):
    """Blocks of a longer prompt are pruned where a shorter one needs its last tokens at full depth.

    The first token after the prefix runs at full depth if the plan is calibrated.
    """
    plan = PLANS[name](engine)
    (prompt,) = prompts_of([210])
    engine.use(plan, budget)
    engine.assert_equal(engine.generate([prompt]), [prompt], plan)
    for part in (prompt[:161], prompt[:170], prompt):
        outputs = engine.generate([part])
        hit = outputs[0].num_cached_tokens
        assert hit <= len(part) - plan.full_depth_last
        assert hit >= BLOCK or has_windows(engine)  # whose blocks vLLM gives away
        also = [hit] if hit and plan.corrections is not None else []
        engine.assert_equal(outputs, [part], plan, also)


@on_llama
def test_a_prefix_from_the_cache_keeps_what_ran_at_full_depth(engine):
    """As in pop's conversations: the end of the earlier prompt, and what was generated after it."""
    plan = PrunePlan((3, 4, 5), full_depth_last=8)
    (prompt,) = prompts_of([150])
    engine.use(plan)
    (answer,) = engine.generate([prompt], count=42)
    longer = prompt + list(answer.outputs[0].token_ids) + prompts_of([60], seed=2)[0]
    outputs = engine.generate([longer])
    hit = outputs[0].num_cached_tokens
    assert hit > len(prompt)
    engine.assert_equal(outputs, [longer], plan, also=range(len(prompt) - 8, hit))


@on_llama
@pytest.mark.parametrize("budget", [2048, 50])
def test_tokens_after_a_prefix_from_the_cache_are_selected_among_themselves(engine, budget):
    plan = PLANS["selecting"](engine)
    (prompt,) = prompts_of([210])
    engine.use(plan, budget)
    engine.generate([prompt])
    for part in (prompt[:161], prompt[:170], prompt):
        (output,) = engine.generate([part])
        hit = output.num_cached_tokens
        after = torch.tensor([part[hit:]])
        assert hit and plan.num_selected(after.shape[1] - plan.full_depth_last)
        cache = engine.pop.new_cache(1, len(prompt))
        engine.pop.prefill(torch.tensor([prompt]), cache, plan=plan)
        _, hidden, offsets = cache.snapshot()
        cache.move_to(torch.tensor([hit]), hidden, offsets)
        cache.skipped.fill_(-1)  # pop selects among those in the cache too
        logits = engine.pop.prefill(after, cache, plan=plan)  # [1, V]
        assert error(output, logits[0].log_softmax(-1)) < 1e-4


@on_llama
def test_a_step_that_prunes_nothing_is_vllms_own(engine, monkeypatch):
    """But the last tokens of a prompt in chunks may select earlier ones."""
    fields = {"full_depth_last": 32, "full_depth_selected": 0.2, "full_depth_below": 60}
    plan = calibrated(engine, (3, 4, 5), **fields)
    engine.use(plan, budget=50)
    ends = []
    run = engine.model.run

    def noted(step, *args):
        ends.append(step.batch.ends.tolist())
        return run(step, *args)

    monkeypatch.setattr(engine.model, "run", noted)
    monkeypatch.setattr(engine.model, "is_tested", False)
    short, long = prompts_of((59, 130))
    engine.assert_equal(engine.generate([short]), [short], plan)
    assert ends == []
    assert not engine.model.is_tested  # by a prompt that is not pruned
    engine.assert_equal(engine.generate([long]), [long], plan)
    assert engine.model.is_tested and ends == [[50], [50], [100], [130]]  # the test runs the first step once more


@on_llama
def test_states_of_prompts_that_never_end_are_displaced(engine, monkeypatch):
    """And a long prompt keeps its own."""
    engine.use(calibrated(engine, (3, 4, 5)))
    monkeypatch.setattr("pop_vllm.model.MOST_KEPT", 100)
    step = SimpleNamespace(continues=torch.ones(1).numpy(), batch=SimpleNamespace(ids=[""]))
    for name, end in (("a", 60), ("b", 40), ("c", 30), ("d", 130), ("e", 1)):
        step.batch.ids = [name]
        step.keep = lambda number, end=end: Kept(end, [], [torch.zeros(end - 1, 2)])
        engine.model._keep_states(step)
        assert [*engine.model.kept] == {"a": ["a"], "b": ["a", "b"], "c": ["b", "c"], "d": ["d"], "e": ["e"]}[name]


@on_llama
@pytest.mark.parametrize("name", ["updates", "all"])
def test_a_preempted_request_begins_anew(engine, name):
    """The cache has fewer blocks than the requests need in the end."""
    plan = PLANS[name](engine)
    engine.use(plan, budget=50)
    scheduler = engine.core.scheduler
    prompts = prompts_of((60, 97, 63))
    pool = scheduler.kv_cache_manager.block_pool
    needed = sum(-(-len(prompt) // BLOCK) for prompt in prompts) * scheduler.kv_cache_manager.num_kv_cache_groups
    held = pool.get_new_blocks(pool.get_num_free_blocks() - needed - 1)
    preempted = []
    preempt = scheduler._preempt_request

    def noted(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = noted
    try:
        outputs = engine.generate(prompts, count=10, skip_reading_prefix_cache=True)
    finally:
        pool.free_blocks(held)
        del scheduler._preempt_request
    assert preempted
    engine.assert_equal(outputs, prompts, plan)


@on_llama
@pytest.mark.parametrize("budget", [2048, 50])
def test_a_request_may_opt_out(engine, budget):
    """By its extra_args, or because it asks for log-probabilities of its prompt. It shares no blocks with others."""
    plan = PrunePlan((2, 3, 4, 5), full_depth_last=3)
    engine.use(plan, budget)
    prompts = prompts_of(LENGTHS)
    extra_args = [{"pop_plan": "none"} if number % 2 else None for number in range(4)]
    outputs = engine.generate(prompts, extra_args=extra_args, prompt_logprobs=[None, None, None, 1])
    for number in range(4):
        own = plan if number in (0, 2) else PrunePlan.none()
        engine.assert_equal(outputs[number : number + 1], prompts[number : number + 1], own)

    expected = engine.pop.logits(torch.tensor([prompts[3]]))[0].log_softmax(-1)
    for position, found in enumerate(outputs[3].prompt_logprobs[1:]):
        token = prompts[3][position + 1]
        assert abs(found[token].logprob - float(expected[position, token])) < 1e-4

    outputs = engine.generate(prompts, extra_args=[{"pop_plan": "none"}] * 4)  # the first and third ran pruned before
    engine.assert_equal(outputs, prompts, PrunePlan.none())


@on_llama
def test_prompts_that_are_too_long_run_at_full_depth(engine, monkeypatch):
    """By POP_LONGEST, which the input processor reads when it is made."""
    plan = PrunePlan((2, 3, 4, 5), full_depth_last=3)
    engine.use(plan)
    monkeypatch.setattr(engine.llm.llm_engine.input_processor, "pop_longest", 97)
    prompts = prompts_of(LENGTHS)  # 3, 97, 40 and 130 tokens
    outputs = engine.generate(prompts)
    engine.assert_equal(outputs[:3], prompts[:3], plan)
    engine.assert_equal(outputs[3:], prompts[3:], PrunePlan.none())
    assert error(outputs[3], engine.expected(prompts[3], list(outputs[3].outputs[0].token_ids), plan)[0]) > 1e-3


@on_llama
def test_a_request_for_another_plan_is_refused(engine):
    """And the next request is answered."""
    plan = PrunePlan((3, 4, 5))
    engine.use(plan)
    prompts = prompts_of([40])
    with pytest.raises(VLLMValidationError, match="pop_plan is 'None'"):
        engine.generate(prompts, extra_args=[{"pop_plan": "None"}])
    engine.assert_equal(engine.generate(prompts), prompts, plan)


@on_llama
def test_the_first_prompt_is_run_without_pruning_and_compared(engine, monkeypatch, caplog):
    engine.use(PrunePlan((3, 4, 5)))
    monkeypatch.setattr(engine.model, "is_tested", False)
    with caplog.at_level("INFO", logger="vllm.pop"):
        engine.generate(prompts_of([40]))
    assert engine.model.is_tested and "3 of 6" in caplog.text


def test_a_plan_of_other_weights_is_refused(engine, monkeypatch, caplog):
    plan = calibrated(engine, (3, 4, 5))
    check_weights(engine.model, plan)
    assert not caplog.text

    def fitted_to(sketch):
        corrections = Corrections(plan.layers, **plan.corrections.tensors, sketch=sketch)
        return dataclasses.replace(plan, corrections=corrections)

    check_weights(engine.model, fitted_to(1.1 * plan.corrections.sketch))
    assert "9.1%" in caplog.text
    with pytest.raises(PlanError, match="other weights"):
        check_weights(engine.model, fitted_to(plan.corrections.sketch.flip(0)))


@on_llama
def test_quantised_projections_are_not_cut(engine, monkeypatch, caplog):
    """Of which float8 is one: its tensors are floating-point, but nothing multiplies with a part of them."""
    model = engine.model
    plan = calibrated(engine, (3, 4, 5))
    projection = model.model.layers[4].self_attn.qkv_proj
    monkeypatch.setattr(model, "key_value_weights", {})
    monkeypatch.setattr(model, "plan", plan)
    weight = torch.nn.Parameter(torch.zeros(256, 64).to(torch.float8_e4m3fn), requires_grad=False)
    monkeypatch.setitem(projection._parameters, "weight", weight)
    monkeypatch.setattr(projection, "quant_method", object())
    model.load_weights([])
    assert sorted(model.key_value_weights) == [0, 1, 2, 3, 5]
    assert "quantised" in caplog.text


@on_llama
def test_a_step_may_have_more_runs_than_requests(engine, monkeypatch):
    """If steps are captured, FlashAttention 3 has a buffer for max_num_seqs. A stand-in plans its work here."""

    def schedule(batch_size, **_):
        return torch.ones(1 + -(-batch_size // 4) * 16, dtype=torch.int32)

    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)
    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", schedule, raising=False)
    ((own,),) = engine.core.model_executor.driver_worker.worker.model_runner.attn_groups
    captured = without_graphs(own.get_metadata_builder().vllm_config)
    captured.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    captured.compilation_config.max_cudagraph_capture_size = 16
    given = flash_attn.FlashAttentionMetadataBuilder(own.kv_cache_spec, own.layer_names, captured, torch.device("cpu"))
    group = SimpleNamespace(layer_names=own.layer_names, get_metadata_builder=lambda: given)
    ((_, builder, _),) = RowAttention([[group]], set(own.layer_names[3:])).builders
    num_runs = 100
    starts = torch.arange(num_runs + 1, dtype=torch.int32)
    metadata = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=starts[1:],
        num_reqs=num_runs,
        num_actual_tokens=num_runs,
        max_query_len=1,
        max_seq_len=num_runs,
        block_table_tensor=torch.zeros(num_runs, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(num_runs, dtype=torch.int64),
    )
    assert len(builder.build(0, metadata).scheduler_metadata) == 401
    assert captured.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(RuntimeError, match="size"):
        given.build(0, metadata)


@on_llama
def test_it_counts_what_it_prunes(engine, monkeypatch, caplog):
    """In the two counters, and in the log after a minute."""
    engine.use(PrunePlan((3, 5), full_depth_last=10))
    monkeypatch.setattr(engine.model, "is_tested", True)
    engine.model.counts.begin_interval()
    engine.model.counts.since -= INTERVAL
    names = ("pop:pruned_tokens_total", {}), ("pop:full_depth_rows_total", {"layer": "5"})
    before = [REGISTRY.get_sample_value(*name) or 0 for name in names]
    with caplog.at_level("INFO", logger="vllm.pop"):
        engine.generate(prompts_of([100]))
        engine.generate(prompts_of([100], seed=2))
    counted = [REGISTRY.get_sample_value(*name) for name in names]
    assert [after - earlier for after, earlier in zip(counted, before, strict=True)] == [180, 20]
    (line,) = caplog.messages
    assert "100 tokens" in line and "90 %" in line
