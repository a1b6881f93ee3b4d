"""Whether a calibrated plan was fitted to the weights that vLLM loads."""

import logging
import tempfile
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pop import PlanError, models
from pop.checkpoints.config_json import read_config
from pop.checkpoints.fingerprint import combined, parameter_sum
from pop.pruning.corrections import Corrections

logger = logging.getLogger("vllm.pop")


class Weights:
    """The fingerprint of a checkpoint, from its tensors as vLLM reads them, before it fuses or quantises any.

    Args:
        hf_config: The config of transformers that vLLM has read.
    """

    def __init__(self, hf_config):
        with tempfile.TemporaryDirectory() as folder:
            hf_config.save_pretrained(folder)
            self.config = read_config(folder)
        with torch.device("meta"):
            self.names = set(models.build(self.config).state_dict())
        self.found: dict[str, tuple[torch.Size, int]] = {}

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass names and tensors on, and take note of them."""
        for name, tensor in tensors:
            if name in self.names:
                self.found[name] = tensor.shape, int(parameter_sum(tensor))
            yield name, tensor

    def check(self, corrections: Corrections) -> None:
        """Raise PlanError if corrections were fitted to other weights. Log a warning if that cannot be seen."""
        missing = self.names - self.found.keys()
        if missing:
            logger.warning("pop: the checkpoint lacks %s, so nothing tells whether POP_PLAN fits it", min(missing))
        elif corrections.fingerprint != combined(self.config, self.found):
            raise PlanError("the plan's corrections were fitted to another model's weights; use pop.calibrate again")
