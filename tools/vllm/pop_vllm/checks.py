"""What is refused, and the test at the first step that prunes."""

import torch
from torch import Tensor

from pop import UnsupportedError

VERSIONS = ("0.32",)  # of vLLM, those that the tests have run with
# Attention backends that write K and V apart from attending, and that take any number of runs (attention.py). Others
# have room for max_num_seqs sequences, or take the upper bound of their lengths for exact.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
# How far two passes without pruning may differ, as a share of the norm. Fused 16-bit operators round less often.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check_version() -> None:
    """Raise UnsupportedError for a version of vLLM that this was not tried with."""
    import vllm

    minor = ".".join(vllm.__version__.split(".")[:2])
    if minor not in VERSIONS:
        wanted = " or ".join(f"{version}.*" for version in VERSIONS)
        raise UnsupportedError(f"vLLM is {vllm.__version__}, with which POP_PLAN was not tried; install {wanted}")


def check_architecture(config) -> None:
    """Raise UnsupportedError unless the model of a VllmConfig is one that can be pruned."""
    from pop_vllm import FAMILIES

    found = config.model_config.architecture
    if found not in FAMILIES:
        raise UnsupportedError(f"the model is a {found}, which POP_PLAN cannot prune; it can {', '.join(FAMILIES)}")


def check_config(config) -> None:
    """Raise UnsupportedError for a model or for options in a VllmConfig that pruning does not work with."""
    from vllm import envs

    check_architecture(config)
    parallel = config.parallel_config
    refused = {
        "the Rust frontend": envs.VLLM_USE_RUST_FRONTEND,  # POP_LONGEST would have no effect
        "LoRA": config.lora_config,
        "speculative decoding": config.speculative_config,
        "a KV connector": config.kv_transfer_config,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1,
        "microbatches": parallel.use_ubatching,
        "data parallelism of experts": config.model_config.is_moe and parallel.data_parallel_size > 1,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        "a pooling model": config.model_config.runner_type != "generate",
        "CUDA graphs of mixed steps in model runner V1": not config.use_v2_model_runner and has_mixed_graphs(config),
    }
    for name, is_used in refused.items():
        if is_used:
            raise UnsupportedError(f"POP_PLAN does not work with {name}; leave out one of them")


def has_mixed_graphs(config) -> bool:
    """Whether whole steps with prompts are captured, which would replay without pruning."""
    from vllm.config.compilation import CUDAGraphMode

    return config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL


def check_backend(layers) -> None:
    """Raise UnsupportedError if a layer's attention cannot write K and V apart, or attend for any number of runs."""
    for layer in layers:
        name = layer.self_attn.attn.attn_backend.get_name()
        if name not in BACKENDS:
            advice = f"set --attention-backend to one of {', '.join(BACKENDS)}"
            raise UnsupportedError(f"POP_PLAN does not work with the attention backend {name}; {advice}")


def check_equal(found: Tensor, own: Tensor) -> None:
    """Raise UnsupportedError if a pass without pruning differs from vLLM's own: h [N, D] after the last norm."""
    error = float((found.float() - own.float()).norm() / own.float().norm())
    if not error <= TOLERANCE[own.dtype]:
        advice = "unset POP_PLAN, and report the options of this server"
        raise UnsupportedError(f"without pruning, h differs from vLLM's own pass by {error:.1e} of its norm; {advice}")
