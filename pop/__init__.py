"""Prefill-only pruning for large language models, in plain PyTorch.

    import pop
    model = pop.load("smollm2-135m")
    print(model.generate("The capital of France is").text)

The method: pop/pruning/reference.py. What makes it fast: pop/engine/forward.py. The models: pop/models.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pop.system import __version__ as __version__

if TYPE_CHECKING:
    from pop.api import *  # noqa: F403


def __getattr__(name: str):
    """Import the library when a name of it is first used. That takes seconds, and `pop --help` uses none."""
    return getattr(import_module("pop.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *import_module("pop.api").__all__]
