"""Swaps: each file replaces parts of a finished module, or functions of the engine, with forms for one kind of machine.

The models and the engine do not know of them. May import pop.engine, pop.checkpoints and what these import.
"""

from functools import partial

from torch import nn

from pop.backends import cpu, cuda, decode_attention, experts
from pop.backends.cuda_graph import Graph
from pop.engine.attention import cache_attention
from pop.engine.cache import CHUNK_SIZE
from pop.engine.stages import Stages, corrected_layer, full_layer
from pop.models.experts import Experts
from pop.models.layers import Embedding
from pop.models.vision import qwen3_vl, siglip
from pop.system.memory import free_bytes

CPU_ATTENTION = partial(cache_attention, chunk=cpu.chunk_attention, decode=cpu.decode_attention)
CPU = Stages(
    full_layer=partial(full_layer, attention=CPU_ATTENTION),
    corrected_layer=partial(corrected_layer, linear=cpu.linear),
    linear=cpu.linear,
)
CUDA_ATTENTION = partial(cache_attention, chunk=cuda.chunk_attention, decode=decode_attention.decode_attention)
CUDA = Stages(full_layer=partial(full_layer, attention=CUDA_ATTENTION), replay=Graph)
FASTER = {nn.Linear: cpu.Linear, Embedding: cpu.Embedding, Experts: experts.Experts}
CUDA_CHUNK_SIZE = 8192  # so most prompts run in one causal pass


def accelerate(module: nn.Module) -> None:
    """Give the parts of a module their faster classes, in place. Weights, names and results stay the same.

    Only parts of exactly these classes change: a subclass, such as an adapter's layer, keeps its own `forward`. The
    attention of the plain pass and of vision towers is replaced.
    """
    backend = cuda if _is_on_gpu(module) else cpu
    module.causal_attention = backend.causal_attention
    for part in module.modules():
        part.__class__ = FASTER.get(type(part), type(part))
        if isinstance(part, siglip.Attention | qwen3_vl.Attention):
            part.attention = backend.vision_attention


def stages_of(module: nn.Module) -> Stages:
    """The stages for the module's device."""
    return CUDA if _is_on_gpu(module) else CPU


def chunk_size_of(module: nn.Module) -> int:
    """How many tokens of a prompt to run at once.

    On a GPU it is 8192 tokens, or fewer if their activations need more than an eighth of the memory that is free.
    Models with sliding windows keep the usual size, because the rings of their caches grow with it.
    """
    if not _is_on_gpu(module) or any(module.config.windows):
        return CHUNK_SIZE
    weight = next(module.parameters())
    free = free_bytes(weight.device)
    size = CUDA_CHUNK_SIZE
    activations = 5 * module.config.intermediate_size * weight.itemsize  # bytes a token, about
    while free is not None and size > CHUNK_SIZE and size * activations > free / 8:
        size //= 2
    return size


def _is_on_gpu(module: nn.Module) -> bool:
    return next(module.parameters()).is_cuda
