"""Prefix caching with plans: two methods of vLLM's engine are wrapped.

The blocks of another prompt hold pruned tokens where this prompt needs its last tokens at full depth. So a prefix that
is found in the cache ends before these. The salt of each request's blocks has a sketch of the plan. So requests that
are not pruned share no blocks with those that are, and an external cache does not mix plans.
"""

import hashlib
import os
from functools import cache, wraps

import torch

from pop import PrunePlan
from pop_vllm.plan import may_prune


@cache
def install() -> None:
    """Wrap the methods, once a process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    init = Scheduler.__init__
    preprocess = EngineCore.preprocess_add_request

    @wraps(init)
    def wrapped_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        plan = PrunePlan.of(os.environ["POP_PLAN"], self.vllm_config.model_config.get_total_num_hidden_layers())
        limit_hits(self.kv_cache_manager, plan)
        self.pop_salt = sketch(plan)

    @wraps(preprocess)
    def wrapped_preprocess(self, request):
        own = self.scheduler.pop_salt if may_prune(request.sampling_params) else "none"
        request.cache_salt = f"pop {own} {request.cache_salt or ''}"
        return preprocess(self, request)

    Scheduler.__init__ = wrapped_init
    EngineCore.preprocess_add_request = wrapped_preprocess


class Beginning:
    """A request of vLLM as it looks when only its first tokens count."""

    def __init__(self, request, num_tokens: int):
        self.request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name):
        return getattr(self.request, name)


def limit_hits(manager, plan: PrunePlan) -> None:
    """Let prefixes that the KVCacheManager finds end before the prompt's last tokens, which run at full depth."""
    find = type(manager).get_computed_blocks

    def limited(request):
        if not may_prune(request.sampling_params):
            return find(manager, request)
        most = max(request.num_prompt_tokens - plan.full_depth_last, 0)
        # The manager leaves the last token out, since it must run for its logits.
        return find(manager, Beginning(request, min(request.num_tokens, most + 1)))

    manager.get_computed_blocks = limited


def sketch(plan: PrunePlan) -> str:
    """A hash of all that a plan computes with."""
    digest = hashlib.sha256(repr(plan.fields()).encode())
    tensors = {} if plan.corrections is None else plan.corrections.tensors
    for tensor in tensors.values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
