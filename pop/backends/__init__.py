"""Swaps: each file replaces parts of a finished module, or a function of the engine, with a form for one machine.

The models and the engine do not depend on them. May import pop.engine, pop.checkpoints and what these import.
"""

from functools import partial

from torch import nn

from pop.backends import cpu, experts
from pop.engine.stages import Stages, full_layer, refit_layer
from pop.models.experts import Experts
from pop.models.layers import Embedding

STAGES = Stages(
    full_layer=partial(full_layer, attention=cpu.attend_cache), refit_layer=partial(refit_layer, linear=cpu.linear)
)
FASTER = {nn.Linear: cpu.Linear, Embedding: cpu.Embedding, Experts: experts.Experts}


def accelerate(module: nn.Module) -> None:
    """Give the parts of a module their faster classes, in place. Weights, names and results stay the same.

    Only parts of exactly these classes change: a subclass, such as an adapter's layer, keeps its own `forward`.
    """
    for part in module.modules():
        part.__class__ = FASTER.get(type(part), type(part))
