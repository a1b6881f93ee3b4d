"""How a model learns what a step contains, from either of vLLM's model runners.

Runner V2 lets a model bring a ModelState, which sees each batch before the model runs. Runner V1 has no such place, so
one of its methods is wrapped.
"""

from functools import cache, wraps

import numpy as np

from pop_vllm.rows import Batch


def may_prune(params) -> bool:
    """Whether a request may be pruned. Not if it asks for log-probabilities of its prompt, or opts out.

    Args:
        params: The request's SamplingParams, or None if it samples nothing.
    """
    if params is None or params.prompt_logprobs is not None:
        return False
    return (params.extra_args or {}).get("pop_plan") != "none"


@cache
def install() -> None:
    """Let runner V1 announce its steps: wrap the method that builds their attention metadata."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    build = GPUModelRunner._build_attention_metadata

    @wraps(build)
    def wrapped(self, *args, **kwargs):
        found = build(self, *args, **kwargs)
        scheduled = kwargs.get("num_scheduled_tokens")
        if scheduled is not None:  # None: a dummy run
            announce(self, scheduled)
        return found

    GPUModelRunner._build_attention_metadata = wrapped


@cache
def model_state():
    """The ModelState for runner V2. It is made here, since its base class needs Triton."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class PrunedState(DefaultModelState):
        def get_additional_cg_support(self):
            """Whole steps may be captured only if they decode. A graph of a step with prompts would not prune."""
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "POP_PLAN"

        def add_request(self, req_index, new_req_data):
            super().add_request(req_index, new_req_data)
            if not hasattr(self, "prompt"):
                self.prompt = np.zeros(self.max_num_reqs, dtype=np.int64)
            length = len(new_req_data.prompt_token_ids or ())
            self.prompt[req_index] = length if may_prune(new_req_data.sampling_params) else 0

        def prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs):
            given = (input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups)
            found = super().prepare_attn(*given, *args, **kwargs)
            if input_batch.has_prefill and cudagraph_mode != CUDAGraphMode.FULL:
                computed = input_batch.num_computed_tokens_np.astype(np.int64)
                scheduled = input_batch.num_scheduled_tokens.astype(np.int64)
                prompt = self.prompt[input_batch.idx_mapping_np]
                batch = Batch(input_batch.req_ids, computed, scheduled, prompt)
                self.model.begin(attn_groups, batch, list(block_tables))
            return found

    return PrunedState


def announce(runner, scheduled: dict[str, int]) -> None:
    """Tell the model of a V1 runner which tokens of which requests the step has."""
    requests = runner.input_batch
    ids = requests.req_ids
    computed = requests.num_computed_tokens_cpu[: len(ids)].astype(np.int64)
    prompt = requests.num_prompt_tokens[: len(ids)].astype(np.int64)
    if (computed >= prompt).all():
        return
    prompt *= [may_prune(runner.requests[name].sampling_params) for name in ids]
    batch = Batch(ids, computed, np.array([scheduled[name] for name in ids]), prompt)
    block_tables = [table.get_device_tensor(len(ids)) for table in requests.block_table.block_tables]
    runner.get_model().begin(runner.attn_groups, batch, block_tables)
