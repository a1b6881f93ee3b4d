"""The record of a run: a file that keeps its unfinished work, so that the same call continues it later."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from pop.errors import InputError
from pop.system import files


class Record(NamedTuple):
    """A file of tensors, and what tells its run from others. Errors are InputErrors."""

    path: str | os.PathLike
    run: dict[str, str]  # by name

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the file."""
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        files.write_whole(self.path, save(tensors, metadata=self.run), "the record of the run", InputError)

    def read(self, names: Iterable[str]) -> list[torch.Tensor]:
        """The tensors of these names, on the CPU: an empty list without a file. Another run's file raises an error."""
        if not os.path.exists(path := os.path.expanduser(self.path)):
            return []
        advice = "give another path, or remove the file to start anew"
        try:
            tensors, saved = files.read_tensors(path)
            found = [tensors[name] for name in names]
            others = [name for name, value in self.run.items() if saved[name] != value]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} is not the record of such a run ({error!r}); {advice}") from None
        if others:
            raise InputError(f"{path} belongs to a run with another {' and another '.join(others)}; {advice}")
        return found
