"""Saved progress of a run, in a file, so that the same call continues it after an interruption."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from pop.errors import InputError
from pop.system import files

WHAT = "the run's progress"


class SavedProgress(NamedTuple):
    """A file of tensors, with the settings that identify the run. Its errors are InputErrors."""

    path: str | os.PathLike
    settings: dict[str, str]  # by name

    def check(self) -> None:
        """Raise, before the work, what `write` or `read` would raise."""
        files.check_writable(self.path, WHAT, InputError)
        self.read(())

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Replace the file, whole or not at all."""
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        files.write_whole(self.path, save(tensors, metadata=self.settings), WHAT, InputError)

    def read(self, names: Iterable[str]) -> dict[str, Tensor] | None:
        """The tensors of these names, on the CPU. None if there is no file. Refuse the file of another run."""
        path = os.path.expanduser(self.path)
        if not os.path.exists(path):
            return None
        advice = "give another path, or remove the file to start anew"
        try:
            tensors, saved = files.read_tensors(path)
            found = {name: tensors[name] for name in names}
            others = [name for name, value in self.settings.items() if saved[name] != value]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} does not hold the progress of such a run ({error!r}); {advice}") from None
        if others:
            raise InputError(f"{path} belongs to a run with another {' and another '.join(others)}; {advice}")
        return found
