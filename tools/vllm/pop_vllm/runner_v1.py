"""vLLM's model runner V1 announces its steps to the model: one of its methods is wrapped."""

from functools import cache, wraps

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from pop_vllm.plan import may_prune
from pop_vllm.rows import Batch


@cache
def install() -> None:
    """Wrap the method that builds the attention metadata of a step, once a process."""
    build = GPUModelRunner._build_attention_metadata

    @wraps(build)
    def wrapped(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        scheduled = kwargs.get("num_scheduled_tokens")
        if scheduled is not None:  # None: a dummy run
            announce(self, scheduled)
        return metadata

    GPUModelRunner._build_attention_metadata = wrapped


def announce(runner, scheduled: dict[str, int]) -> None:
    """Tell a runner's model which tokens of which requests the step has."""
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
