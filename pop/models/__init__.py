"""The model families, one file each."""

from torch import nn

from pop.models import gemma3
from pop.models.llama import Llama
from pop.models.qwen3_vl import Qwen3, Qwen3VL

FAMILIES = {"llama": Llama, "gemma3": gemma3.build, "qwen3": Qwen3, "qwen3_vl": Qwen3VL}


def build(config) -> nn.Module:
    """The module that `config` describes, on torch's current default device; under "meta" nothing is allocated."""
    return FAMILIES[config.family](config)
