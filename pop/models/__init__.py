"""The model families, one file each."""

from torch import nn

from pop.models import gemma3
from pop.models.llama import Llama

FAMILIES = {"llama": Llama, "gemma3": gemma3.build}


def build(config) -> nn.Module:
    """The module that `config` describes, on torch's current default device; under "meta" nothing is allocated."""
    return FAMILIES[config.family](config)
