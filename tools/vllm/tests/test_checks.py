"""What is refused, and the values of POP_PLAN."""

from types import SimpleNamespace

import pytest
import torch
import vllm
from pop_vllm import checks
from vllm.config.compilation import CUDAGraphMode

from pop import UnsupportedError


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
        "use_ubatching": False,
        "kv_sharing_fast_prefill": False,
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
        {"kv_sharing_fast_prefill": True},
        {"cudagraph_mode": CUDAGraphMode.FULL},
    ],
)
def test_options_that_do_not_go_with_pruning_are_refused(changed):
    checks.check_config(config())
    checks.check_config(config(cudagraph_mode=CUDAGraphMode.FULL, use_v2_model_runner=True))  # it asks the ModelState
    with pytest.raises(UnsupportedError):
        checks.check_config(config(**changed))


def test_other_models_and_versions_are_refused(monkeypatch):
    checks.check_version()
    checks.check_architecture(config())
    with pytest.raises(UnsupportedError, match="MixtralForCausalLM"):
        checks.check_architecture(config(architecture="MixtralForCausalLM"))
    monkeypatch.setattr(vllm, "__version__", "0.29.1")
    with pytest.raises(UnsupportedError, match="0.29.1"):
        checks.check_version()


def test_a_backend_that_writes_only_when_it_attends_is_refused():
    backend = SimpleNamespace(forward_includes_kv_cache_update=False, get_name=lambda: "NAME")
    layer = SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(attn_backend=backend)))
    checks.check_backend([layer])
    backend.forward_includes_kv_cache_update = True
    with pytest.raises(UnsupportedError, match="NAME"):
        checks.check_backend([layer])


@pytest.mark.parametrize(("dtype", "small", "large"), [(torch.float32, 1e-4, 1e-2), (torch.bfloat16, 1e-2, 0.2)])
def test_a_pass_that_differs_without_pruning_is_refused(dtype, small, large):
    own = torch.randn(5, 8, dtype=dtype)
    checks.check_equal((1 + small) * own, own)
    for wrong in ((1 + large) * own, own * torch.nan):
        with pytest.raises(UnsupportedError):
            checks.check_equal(wrong, own)
