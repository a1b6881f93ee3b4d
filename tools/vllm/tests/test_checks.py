"""What is refused, and the values of POP_PLAN."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import vllm
from pop_vllm import checks, plan
from pop_vllm.plan import longest, may_prune, opt_out
from pop_vllm.prefix_cache import limit_hits
from pop_vllm.step import Step
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.engine.input_processor import InputProcessor

from pop import PlanError, PrunePlan, UnsupportedError


def config(**changed):
    """A VllmConfig as far as the checks read it."""
    fields = {
        "lora_config": None,
        "speculative_config": None,
        "kv_transfer_config": None,
        "use_v2_model_runner": False,
        "runner_type": "generate",
        "architecture": "LlamaForCausalLM",
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 2,
        "is_moe": False,
        "use_ubatching": False,
        "kv_sharing_fast_prefill": False,
        "hf_text_config": SimpleNamespace(num_hidden_layers=6),
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
    } | changed
    part = SimpleNamespace(**fields)
    names = ("model_config", "parallel_config", "cache_config", "compilation_config")
    return SimpleNamespace(**fields, **dict.fromkeys(names, part))


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_config": object()},
        {"speculative_config": object()},
        {"kv_transfer_config": object()},
        {"runner_type": "pooling"},
        {"pipeline_parallel_size": 2},
        {"decode_context_parallel_size": 2},
        {"use_ubatching": True},
        {"is_moe": True},
        {"kv_sharing_fast_prefill": True},
        {"cudagraph_mode": CUDAGraphMode.FULL},
    ],
)
def test_options_that_do_not_go_with_pruning_are_refused(changed):
    checks.check_config(config())
    checks.check_config(config(cudagraph_mode=CUDAGraphMode.FULL, use_v2_model_runner=True))  # it asks the ModelState
    with pytest.raises(UnsupportedError):
        checks.check_config(config(**changed))


def test_a_frontend_without_pythons_input_processor_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedError, match="the Rust frontend"):
        checks.check_config(config())


def test_other_models_and_versions_are_refused(monkeypatch):
    checks.check_version()
    checks.check_architecture(config())
    with pytest.raises(UnsupportedError, match="MixtralForCausalLM"):
        checks.check_architecture(config(architecture="MixtralForCausalLM"))
    plan.install()
    with pytest.raises(UnsupportedError, match="MixtralForCausalLM"):  # before there is an engine
        InputProcessor(config(architecture="MixtralForCausalLM"))
    for name in ("missing.plan", "9,11"):
        monkeypatch.setenv("POP_PLAN", name)
        with pytest.raises(PlanError, match=name if name == "missing.plan" else "layer 11"):
            InputProcessor(config())
    monkeypatch.setenv("POP_PLAN", "none")
    monkeypatch.setenv("POP_LONGEST", "many")
    with pytest.raises(PlanError, match="POP_LONGEST is 'many'"):
        InputProcessor(config())
    monkeypatch.setattr(vllm, "__version__", "0.29.1")
    with pytest.raises(UnsupportedError, match="0.29.1"):
        checks.check_version()


def test_a_plan_of_a_model_with_other_widths_is_refused(monkeypatch):
    """Before there is an engine, since quantised weights cannot be compared with a plan's sketch."""

    def sizes(width, kv_heads, head_width):
        names = ("get_hidden_size", "get_total_num_kv_heads", "get_head_size")
        values = (width, kv_heads, head_width)
        return {name: partial(int, value) for name, value in zip(names, values, strict=True)}

    third = PrunePlan.load("smollm2-135m-third")
    plan.check_widths(third, SimpleNamespace(**sizes(576, 3, 64)))
    plan.check_widths(PrunePlan((2,)), SimpleNamespace())
    plan.install()
    monkeypatch.setenv("POP_PLAN", "smollm2-135m-third")
    layers = SimpleNamespace(num_hidden_layers=30)
    for other in (sizes(4096, 3, 64), sizes(576, 8, 64)):
        with pytest.raises(PlanError, match="a width of 576 and keys of 192 numbers"):
            InputProcessor(config(hf_text_config=layers, **other))


def test_other_backends_of_attention_are_refused():
    def layer(name):
        backend = SimpleNamespace(get_name=lambda: name)
        return SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(attn_backend=backend)))

    checks.check_backend([layer(name) for name in checks.BACKENDS])
    with pytest.raises(UnsupportedError, match="FLASHINFER"):
        checks.check_backend([layer("TRITON_ATTN"), layer("FLASHINFER")])


def test_what_a_request_may_say():
    assert may_prune(SamplingParams()) and may_prune(SamplingParams(extra_args={"other": 1}))
    full_depth = (
        {"extra_args": {"pop_plan": "none"}},
        {"prompt_logprobs": 1},
        {"prompt_logprob_token_ids": [[5, 6], [7, 8]]},
    )
    for fields in full_depth:
        assert not may_prune(SamplingParams(**fields))
    for other in ("None", "smollm2-135m-14", 0.5):
        with pytest.raises(PlanError, match="pop_plan"):
            may_prune(SamplingParams(extra_args={"pop_plan": other}))


def test_the_longest_prompt_that_is_pruned(monkeypatch):
    monkeypatch.delenv("POP_LONGEST", raising=False)
    assert longest() is None
    monkeypatch.setenv("POP_LONGEST", "8000")
    assert longest() == 8000
    for wrong in ("0", "-1", "8e3", "all"):
        monkeypatch.setenv("POP_LONGEST", wrong)
        with pytest.raises(PlanError, match="POP_LONGEST is"):
            longest()
    params = SamplingParams(extra_args={"other": 1})
    opt_out(params)
    assert not may_prune(params) and params.extra_args["other"] == 1
    opt_out(None)  # of a request that samples nothing


@pytest.mark.parametrize(("dtype", "small", "large"), [(torch.float32, 1e-4, 1e-2), (torch.bfloat16, 1e-2, 0.2)])
def test_a_pass_that_differs_without_pruning_is_refused(dtype, small, large):
    own = torch.randn(5, 8, dtype=dtype)
    checks.check_equal((1 + small) * own, own)
    for wrong in ((1 + large) * own, own * torch.nan):
        with pytest.raises(UnsupportedError):
            checks.check_equal(wrong, own)


def test_a_request_that_is_not_pruned_finds_all_of_its_cached_prefix():
    """Its blocks hold no pruned tokens. Of another prompt, the last tokens run at full depth."""

    class Manager:
        def get_computed_blocks(self, request):
            return request.num_tokens

    manager = Manager()
    limit_hits(manager, PrunePlan((1,), full_depth_last=7))
    for asked, found in (({}, 94), ({"pop_plan": "none"}, 100)):
        params = SamplingParams(extra_args=asked)
        request = SimpleNamespace(sampling_params=params, num_tokens=100, num_prompt_tokens=100)
        assert manager.get_computed_blocks(request) == found


def test_what_is_kept_of_a_request_is_not_a_view_of_the_states_of_its_step():
    states = torch.randn(5, 4)  # of 5 requests
    batch = SimpleNamespace(first=[0, 3], scheduled=[3, 2], ends=[3, 2])
    step = SimpleNamespace(kept=[None, None], batch=batch, latest=[states], entering=None)
    (kept,) = Step.keep(step, 1).latest
    assert torch.equal(kept, states[1]) and kept.untyped_storage().nbytes() == 4 * 4
