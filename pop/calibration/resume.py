"""Saved progress of a run, in a file, so that the same call continues it after an interruption."""

import json
import logging
import os
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from pop.errors import InputError
from pop.system import files

WHAT = "the run's progress"

logger = logging.getLogger(__name__)


class SavedProgress(NamedTuple):
    """A file of tensors, and what identifies the run. Its errors are InputErrors."""

    path: str | os.PathLike | None  # None: nothing is kept
    run: str

    def write(self, tensors: dict[str, Tensor], found: dict) -> None:
        """Replace the file, whole or not at all. found: what the run has decided, as JSON allows it.

        If that fails, the run goes on, and what it has done since the last time could not be continued.
        """
        if self.path is None:
            return
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        content = save(tensors, metadata={"run": self.run, "found": json.dumps(found)})
        try:
            files.write_whole(self.path, content, WHAT, InputError)
        except InputError as error:
            logger.warning("%s; meanwhile the run goes on", error)

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors, on the CPU, and what the run has decided. None if there is no file.

        The file of another run is refused.
        """
        path = os.path.expanduser(self.path or "")
        if not os.path.exists(path):
            return None
        advice = "give another path, or remove the file to start anew"
        try:
            tensors, saved = files.read_tensors(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} does not hold the progress of a run ({error!r}); {advice}") from None
        if saved.get("run") != self.run:
            raise InputError(f"{path} belongs to a run with another model, plan, text, option or version; {advice}")
        return tensors, json.loads(saved["found"])
