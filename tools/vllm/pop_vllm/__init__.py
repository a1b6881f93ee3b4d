"""Prefill-only pruning as a plugin of vLLM.

    POP_PLAN=my.plan vllm serve meta-llama/Llama-3.1-8B-Instruct

Read rows.py first (which tokens run at full depth), then model.py (how a step runs).
"""

import os

FAMILIES = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")


def register() -> None:
    """Put the pruned models in the place of vLLM's own if POP_PLAN is set. vLLM calls this in each of its processes."""
    if not os.environ.get("POP_PLAN"):
        return
    from vllm import ModelRegistry

    from pop_vllm import plan, prefix_cache
    from pop_vllm.checks import check_version

    check_version()
    for name in FAMILIES:
        ModelRegistry.register_model(name, f"pop_vllm.model:Pruned{name}")
    plan.install()
    prefix_cache.install()
