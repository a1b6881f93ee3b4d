"""From other forms of weights to Hugging Face's layout, the one that `pop` reads: one file for each form.

    python -m tools.convert SOURCE DIR [--adapter DIR]

DIR appears when all its files are written, or not at all.
"""

import os
from functools import partial
from os import PathLike
from pathlib import Path

from pop.checkpoints.registry import find_folder
from pop.errors import InputError
from pop.system.files import staged
from tools.convert import gguf, lora, meta


def convert(
    source: str | PathLike, folder: str | PathLike, adapter: str | PathLike | None = None, *, progress: bool = True
) -> Path:
    """Write a checkpoint in Hugging Face's layout into a new folder, and return that folder.

    Args:
        source: A GGUF file or a folder in Meta's layout. If an `adapter` is given, this is its base model, as a folder
            in Hugging Face's layout or as a name that `pop.load` takes.
        folder: It must not exist, or be empty.
        adapter: The folder of a LoRA adapter that PEFT has saved, to be merged into the base model.
        progress: Show a bar on stderr.

    Raises a PopError, which names what is broken or not supported. Then `folder` is as before.
    """
    path = Path(os.path.expanduser(source))
    if adapter is not None:
        write = partial(lora.write, find_folder(source), Path(os.path.expanduser(adapter)))
    elif os.path.isfile(path):
        write = partial(gguf.write, path)
    elif os.path.isfile(path / "params.json"):
        write = partial(meta.write, path)
    else:
        raise InputError(f"{path} is neither a GGUF file nor a folder with Meta's params.json; check the path")
    folder = Path(os.path.expanduser(folder))
    with staged(folder) as staging:
        write(staging, progress)
    return folder
