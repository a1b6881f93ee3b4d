"""Swaps: each file replaces parts of a finished module, or a function of the engine, with a form for one machine.

The models and the engine do not depend on them. May import pop.engine, pop.checkpoints and what these import.
"""

from functools import partial

import torch
from torch import nn

from pop.backends import cpu, cuda, experts
from pop.backends.cuda_graph import Graph
from pop.engine.cache import CHUNK_SIZE
from pop.engine.stages import Stages, corrected_layer, full_layer
from pop.models.experts import Experts
from pop.models.layers import Embedding
from pop.models.vision import qwen3_vl, siglip
from pop.system.memory import free_bytes

CPU = Stages(
    full_layer=partial(full_layer, attention=cpu.cache_attention),
    corrected_layer=partial(corrected_layer, linear=cpu.linear),
    linear=cpu.linear,
)
CUDA = Stages(full_layer=partial(full_layer, attention=cuda.cache_attention), replay=Graph)
FASTER = {nn.Linear: cpu.Linear, Embedding: cpu.Embedding, Experts: experts.Experts}
CUDA_CHUNK_SIZE = 8192  # so most prompts run in one causal pass


def accelerate(module: nn.Module) -> None:
    """Give the parts of a module their faster classes, in place. Weights, names and results stay the same.

    Only parts of exactly these classes change: a subclass, such as an adapter's layer, keeps its own `forward`. The
    attention of the plain pass and of vision towers is replaced.
    """
    backend = cuda if _device(module).type == "cuda" else cpu
    module.causal_attention = backend.causal_attention
    for part in module.modules():
        part.__class__ = FASTER.get(type(part), type(part))
        if isinstance(part, siglip.Attention | qwen3_vl.Attention):
            part.attention = backend.vision_attention


def stages_of(module: nn.Module) -> Stages:
    """The stages for the module's device."""
    return CUDA if _device(module).type == "cuda" else CPU


def chunk_size_of(module: nn.Module) -> int:
    """How many tokens of a prompt to run at once.

    On a GPU, 8192 tokens, or fewer if their activations need more than an eighth of the memory that is free. Models
    with sliding windows keep the usual size, because the rings of their caches grow with it.
    """
    device, config = _device(module), module.config
    if device.type != "cuda" or any(config.windows):
        return CHUNK_SIZE
    size, free = CUDA_CHUNK_SIZE, free_bytes(device)
    activations = 5 * config.intermediate_size * next(module.parameters()).itemsize  # bytes a token, about
    while free is not None and size > CHUNK_SIZE and size * activations > free / 8:
        size //= 2
    return size


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
