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
