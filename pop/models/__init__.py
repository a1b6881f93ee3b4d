"""The architectures, in plain PyTorch: one file a family, and what they share.

base.py states what a layer and a model must offer so that prefill can prune them. May import pop.errors and pop.system.
"""

from pop.models.base import PrunableModel
from pop.models.gemma3 import Gemma3
from pop.models.llama import Llama
from pop.models.olmo2 import Olmo2
from pop.models.qwen3 import Qwen3
from pop.models.qwen3_vl import Qwen3VL

FAMILIES = {"llama": Llama, "gemma3": Gemma3, "qwen3": Qwen3, "qwen3_vl": Qwen3VL, "olmo2": Olmo2}


def build(config) -> PrunableModel:
    """The module that `config` describes, on torch's current default device; under "meta" nothing is allocated."""
    return FAMILIES[config.family](config)
