"""vLLM's model runner V2 announces its steps to a ModelState, which the model brings."""

import numpy as np
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from pop_vllm.plan import may_prune
from pop_vllm.rows import Batch


class PrunedState(DefaultModelState):
    """Tells the model which tokens of which requests a step has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.prompt = np.zeros(self.max_num_reqs, dtype=np.int64)  # of each request, as in rows.Batch

    def get_additional_cg_support(self):
        """Whole steps may be captured only if they decode. A graph of a step with prompts would not prune."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, "POP_PLAN"

    def add_request(self, req_index, new_req_data):
        super().add_request(req_index, new_req_data)
        length = len(new_req_data.prompt_token_ids or ())
        self.prompt[req_index] = length if may_prune(new_req_data.sampling_params) else 0

    def prepare_attn(
        self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
    ):
        given = (input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config)
        metadata = super().prepare_attn(*given, **kwargs)
        if input_batch.has_prefill and cudagraph_mode != CUDAGraphMode.FULL:
            computed = input_batch.num_computed_tokens_np.astype(np.int64)
            scheduled = input_batch.num_scheduled_tokens.astype(np.int64)
            batch = Batch(input_batch.req_ids, computed, scheduled, self.prompt[input_batch.idx_mapping_np])
            self.model.begin(attn_groups, batch, list(block_tables))
        return metadata
