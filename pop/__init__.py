"""Prefill-only pruning for large language models, in plain PyTorch.

    import pop
    model = pop.load("smollm2-135m")
    print(model.generate("The capital of France is").text)

The method: pop/pruning/reference.py. What makes it fast: pop/engine/forward.py. The models: pop/models.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

from pop.system import __version__ as __version__

if TYPE_CHECKING:
    from pop.api import *  # noqa: F403


def __getattr__(name: str):
    """Import the library when a name of it is first used. That takes seconds, and `pop --help` uses none."""
    api = import_module("pop.api")
    return globals()[name] if name in globals() else getattr(api, name)  # a folder that it has imported


def __dir__() -> list[str]:
    return [*globals(), *import_module("pop.api").__all__]


class _Aliases:
    """Finds modules that other code imports by a short name, such as pop.reference for pop.pruning.reference."""

    @classmethod
    def find_spec(cls, name: str, path, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, cls) if name in ("pop.cost", "pop.parallel", "pop.reference", "pop.selection") else None

    @staticmethod
    def create_module(spec: ModuleSpec):
        module = __getattr__(spec.name.removeprefix("pop."))
        spec.loader_state = module.__spec__
        return module

    @staticmethod
    def exec_module(module) -> None:
        """Restore what importing has changed. The module has been executed under its own name."""
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Aliases)
