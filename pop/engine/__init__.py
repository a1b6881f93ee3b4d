"""How pruned prefill and full-depth decode run on a static KV cache. May import: pop.models, pop.pruning."""

from pop.engine.forward import (
    EAGER,
    Layout,
    Seen,
    Stages,
    decode,
    extend,
    full_layer,
    head,
    prefill,
    pruned_layer,
    refit_layer,
    vision_layer,
)

__all__ = [
    "EAGER",
    "Layout",
    "Seen",
    "Stages",
    "decode",
    "extend",
    "full_layer",
    "head",
    "prefill",
    "pruned_layer",
    "refit_layer",
    "vision_layer",
]
