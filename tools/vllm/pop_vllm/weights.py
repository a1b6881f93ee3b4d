"""Whether a calibrated plan was fitted to the weights that vLLM has loaded."""

import logging

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from pop.pruning.sketch import check_distance, distance, probe_states, sketch_of

logger = logging.getLogger("vllm.pop")


@torch.no_grad()
def check_weights(model, plan) -> None:
    """Raise PlanError if a calibrated plan was fitted to other weights. Log a warning if they are near or quantised.

    All ranks of a model call this together.
    """
    if not model.key_value_weights.keys() >= set(plan.layers):
        logger.warning("pop: the weights are quantised, so nothing tells whether POP_PLAN fits them")
        return
    layers = model.model.layers
    width = layers[0].input_layernorm.weight.shape[0]
    h = probe_states(width).to(model.device, model.dtype)  # [J, D]
    projected = [torch.stack(model.projected(index, h)) for index in plan.layers]  # [2, J, rows] each
    projected = torch.stack(projected).transpose(2, 3).float()  # [n, 2, rows, J]: this rank's heads
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1:
        gathered = tensor_model_parallel_all_gather(projected.contiguous(), dim=2).unflatten(2, (ranks, -1))
        copies = max(1, ranks // layers[0].self_attn.total_num_kv_heads)  # ranks that hold the same head
        projected = gathered[:, :, ::copies].flatten(2, 3)  # [n, 2, K * E, J]
    note = check_distance(distance(sketch_of(projected), plan.corrections.sketch), plan.name)
    if note:
        logger.warning("pop: %s", note)
