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
    """A file of tensors, with the settings that identify the run. Its errors are InputErrors."""

    path: str | os.PathLike
    settings: dict[str, str]  # by name

    def write(self, tensors: dict[str, Tensor], found: dict) -> None:
        """Replace the file, whole or not at all. found: what the run has decided, as JSON allows it.

        If that fails, the run goes on, and what it has done since the last time could not be continued.
        """
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        content = save(tensors, metadata=self.settings | {"found": json.dumps(found)})
        try:
            files.write_whole(self.path, content, WHAT, InputError)
        except InputError as error:
            logger.warning("%s; meanwhile the run goes on", error)

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """The tensors, on the CPU, and what the run has decided. None if there is no file.

        The file of another run is refused.
        """
        path = os.path.expanduser(self.path)
        if not os.path.exists(path):
            return None
        advice = "give another path, or remove the file to start anew"
        try:
            tensors, saved = files.read_tensors(path)
            found = json.loads(saved["found"])
            others = [name for name, value in self.settings.items() if saved[name] != value]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} does not hold the progress of such a run ({error!r}); {advice}") from None
        if others:
            raise InputError(f"{path} belongs to a run with another {' and another '.join(others)}; {advice}")
        return tensors, found
