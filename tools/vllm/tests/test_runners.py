"""Runner V2's half runs on GPUs only. Its logic is tested with stand-ins, and its signatures against vLLM's."""

import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pop_vllm.runner_v2 import PrunedState
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def test_signatures():
    for name in ("get_additional_cg_support", "add_request", "prepare_attn"):
        own = inspect.signature(getattr(PrunedState, name)).parameters
        theirs = inspect.signature(getattr(DefaultModelState, name)).parameters
        named = [parameter for parameter in own if parameter != "kwargs"]
        assert named == list(theirs)[: len(named)]
        assert "kwargs" in own or named == list(theirs)
    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert fields >= {"req_ids", "has_prefill", "num_computed_tokens_np", "num_scheduled_tokens", "idx_mapping_np"}
    assert {field.name for field in dataclasses.fields(NewRequestData)} >= {"prompt_token_ids", "sampling_params"}
    assert "get_model_state_cls" in inspect.getsource(model_states)
    assert "num_scheduled_tokens" in inspect.signature(GPUModelRunner._build_attention_metadata).parameters


@pytest.fixture
def state(monkeypatch):
    """A state with room for four requests, whose model notes what `begin` gets."""
    begun = []
    model = SimpleNamespace(begin=lambda groups, batch, tables: begun.append((groups, batch, tables)), begun=begun)
    monkeypatch.setattr(DefaultModelState, "__init__", lambda self: vars(self).update(max_num_reqs=4, model=model))
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *args: None)
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *args, **kwargs: "metadata")
    return PrunedState()


def test_a_step_with_prompts_is_announced(state):
    requests = {2: (50, SamplingParams()), 0: (9, SamplingParams(extra_args={"pop_plan": "none"}))}
    for index, (length, params) in requests.items():
        state.add_request(index, SimpleNamespace(prompt_token_ids=[0] * length, sampling_params=params))
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        has_prefill=True,
        num_computed_tokens_np=np.array([32, 0], dtype=np.int32),
        num_scheduled_tokens=np.array([18, 9], dtype=np.int32),
        idx_mapping_np=np.array([2, 0]),
    )
    tables = (torch.zeros(2, 3),)
    given = (batch, CUDAGraphMode.PIECEWISE, tables, None, "groups", None)
    assert state.prepare_attn(*given, for_capture=False) == "metadata"
    ((groups, found, found_tables),) = state.model.begun
    assert (groups, found.ids, found_tables) == ("groups", ["a", "b"], list(tables))
    assert [part.tolist() for part in found[1:]] == [[32, 0], [18, 9], [50, 0]]


def test_a_captured_or_decoding_step_is_not(state):
    assert state.get_additional_cg_support()[0] == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    for mode, has_prefill in ((CUDAGraphMode.FULL, True), (CUDAGraphMode.NONE, False)):
        state.prepare_attn(SimpleNamespace(has_prefill=has_prefill), mode, (), None, [], None)
    assert state.model.begun == []
