"""How the method runs: pruned prefill and full-depth decode on a static KV cache, eager or compiled.

README.md in this folder has the reading order. May import pop.models, pop.pruning and what these import.
"""

from pop.engine.decode_step import decode
from pop.engine.forward import extend, prefill
from pop.engine.stages import EAGER, Stages

__all__ = ["EAGER", "Stages", "decode", "extend", "prefill"]
