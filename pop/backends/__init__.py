"""Swaps: each file replaces parts of a finished module with forms for one kind of machine.

The models and the engine do not know of them. May import pop.engine, pop.checkpoints and what these import.
"""

import logging

import torch
from torch import nn

from pop.backends import cpu, cpu_graph, cuda, cuda_graph, experts, span_attention
from pop.engine.cache import CHUNK_SIZE
from pop.models.experts import Experts
from pop.models.layers import Embedding
from pop.models.vision import qwen3_vl, siglip
from pop.pruning.cost import layer_weights

FASTER = {nn.Linear: cpu.Linear, Embedding: cpu.Embedding, Experts: experts.Experts}
CUDA_CHUNK_SIZE = 8192  # so most prompts run in one causal pass
# Multiply-adds that a multiprocessor of an H100 does in about half a millisecond. The host launches the kernels of a
# layer in 0.65 ms, of which padding may cost a fifth.
WHILE_LAUNCHING = 1_200_000_000
LEAST_CHUNK_SIZE = 256  # tokens of each row in a batch on a GPU
# Tokens of a batch that run at once on a GPU. Compiled code would compile again, with 64-bit indices, from 2^31 numbers
# on. So MLPs may be 65,535 numbers wide.
MOST_IN_BATCH = 32_768

logger = logging.getLogger(__name__)


def accelerate(module: nn.Module) -> None:
    """Give the parts of a module their faster classes, in place. Weights, names and results stay the same.

    Only parts of exactly these classes change: a subclass, such as an adapter's layer, keeps its own `forward`. The
    attention of the plain pass and that over a cache are replaced. On GPUs, so are those of calibration and of vision
    towers.
    """
    cpu.make_cache_folder()
    cpu.keep_freed_memory()
    backend = cuda if _is_on_gpu(module) else cpu
    if backend is cuda:
        capability = torch.cuda.get_device_properties(next(module.parameters()).device).major
        cuda.use_flash_3(capability)
        needed = {
            "Triton": span_attention.HAS_TRITON,
            "torch 2.6 to 2.15 for CUDA": cuda.HAS_KERNELS,
            "a GPU of compute capability 8.0 or newer": capability >= 8,
        }
        for what, is_there in needed.items():
            if not is_there:
                logger.warning("attention is slow here: it needs %s", what)
    module.causal_attention = backend.causal_attention
    if backend is cuda:
        module.masked_attention = cuda.masked_attention
    for layer in module.layers:
        layer.cache_attention = backend.cache_attention
        layer.multiply = cpu.linear
    for part in module.modules():
        part.__class__ = FASTER.get(type(part), type(part))
        if backend is cuda and isinstance(part, siglip.Attention | qwen3_vl.Attention):
            part.attention = cuda.vision_attention


def replay_of(module: nn.Module, is_compiled: bool = False) -> type | None:
    """What repeats work on the module's device (`Stages.replay`). On a CPU, only compiled decode steps are repeated."""
    if _is_on_gpu(module):
        return cuda_graph.Graph
    return cpu_graph.Graph if is_compiled and cpu_graph.CAN_RECORD else None


def replayed_tokens_of(module: nn.Module) -> int:
    """How many tokens may be in a prefill that is repeated on a GPU (`Stages.replayed_tokens`).

    With so many or fewer, the GPU waits for the host to launch kernels. With more, a graph would save no time, and the
    padding in it would cost some.
    """
    if not _is_on_gpu(module):
        return 0
    device = next(module.parameters()).device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tokens = WHILE_LAUNCHING * processors // layer_weights(module.config)
    # Processes that share a module must run equal chunks, but their shares or GPUs may differ.
    return int(module.largest_of_processes(torch.tensor([tokens], device=device)))


def chunk_size_of(module: nn.Module) -> int:
    """How many tokens of a call to run at once on a GPU, or of a row on a CPU.

    It does not depend on the memory that is free, because processes that share a module must run equal chunks. Models
    with sliding windows keep the usual size, because the rings of their caches grow with it.
    """
    return CUDA_CHUNK_SIZE if _is_on_gpu(module) and not any(module.config.windows) else CHUNK_SIZE


def chunk_size_of_rows(chunk_size: int, rows: int) -> int:
    """How many tokens of each row to run at once on a GPU, if the rows of a batch share `chunk_size`.

    So the memory for activations does not grow with the batch, up to 32 rows. More rows have LEAST_CHUNK_SIZE each, as
    long as all of them have at most MOST_IN_BATCH.
    """
    return max(1, chunk_size // rows, min(chunk_size, LEAST_CHUNK_SIZE, MOST_IN_BATCH // rows))


def _is_on_gpu(module: nn.Module) -> bool:
    return next(module.parameters()).is_cuda
