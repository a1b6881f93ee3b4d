"""The parts of layers, to notice changes: compiled code and captured graphs do not look at their layers again."""

from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from operator import is_

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle

from pop.models.base import PrunableModel

UNWATCHED = {"training", "in_features", "out_features"}  # train() sets one flag in all parts; no code reads the sizes


class Parts:
    """The sub-modules, weights and settings of a layer as they are now, or of a model without its layers."""

    def __init__(self, layer: nn.Module):
        of_layers = chain(layer.layers, layer.tower) if isinstance(layer, PrunableModel) else ()
        named = dict(layer.named_modules(memo={part for other in of_layers for part in other.modules()}))
        self.parts, attributes = list(named.values()), [vars(part) for part in named.values()]
        hooks = chain.from_iterable((part._forward_hooks, part._forward_pre_hooks) for part in self.parts)
        hooks = [found for found in (*hooks, _global_forward_hooks, _global_forward_pre_hooks) if found]
        tables = chain.from_iterable((part._modules, part._parameters, part._buffers) for part in self.parts)
        places = [(table, key) for table in tables for key in table]
        places += [(own, key) for own in attributes for key in _settings(own).keys() - UNWATCHED]
        self.tables, self.keys = zip(*places, (vars(layer), "training"), strict=True)
        self.values = [*map(dict.get, self.tables, self.keys)]
        self.weights = [value for value in self.values if type(value) in (nn.Parameter, torch.Tensor)]
        self.sized = attributes + hooks
        self.numbers = self._numbers()
        self.can_be_compiled = not hooks and not any("forward" in own for own in attributes)
        numbered: dict[int, int] = {}  # tensors, since one may have two names
        self.kind = tuple((name, *_kind(part, numbered)) for name, part in named.items())

    def unchanged(self) -> bool:
        """Whether all is as it was, apart from new hooks and from values of weights that changed in place.

        This takes 3 us for a layer whose parts are in the CPU's cache, since each comparison is a loop in C.
        """
        return all(map(is_, map(dict.get, self.tables, self.keys), self.values)) and self._numbers() == self.numbers

    def _numbers(self) -> list:
        return [*map(type, self.parts), *map(len, self.sized), *map(torch.Tensor.data_ptr, self.weights)]


class Seen(dict[nn.Module, int | None]):
    """The number of each layer's kind. Layers of one kind differ in the values of their weights only.

    None: the layer has hooks, a `forward` set from outside, or a list, dict or set. It can only run as it is.
    """

    def __init__(self):
        self.parts, self.kinds, self.hooks = [], {}, None

    def look(self, layers: Iterable[nn.Module]) -> None:
        """Number the layers as they are now. A kind that has been there before keeps its number."""
        self.clear()
        self.parts, self.hooks = [], RemovableHandle.next_id
        for layer in layers:
            self[layer]  # numbers it

    def __missing__(self, layer: nn.Module) -> int | None:
        parts = Parts(layer)
        self.parts.append(parts)
        self[layer] = None
        if parts.can_be_compiled:
            with suppress(TypeError):  # lists, dicts and sets have no hash
                self[layer] = self.kinds.setdefault(parts.kind, len(self.kinds))
        return self[layer]

    def unchanged(self, look: bool = True) -> bool:
        """Whether the layers, or unless `look`, their hooks are as before. Each new hook of a process has a new id."""
        return self.hooks == RemovableHandle.next_id and (not look or all(parts.unchanged() for parts in self.parts))


def _settings(attributes: dict) -> dict:
    """The attributes of a part that its code may read. Names with an underscore are torch's, or belong to caches."""
    numbers, others = (bool, int, float, str), (tuple, list, dict, set)
    return {
        key: value
        for key, value in attributes.items()
        if isinstance(value, numbers) or (key[0] != "_" and (callable(value) or isinstance(value, others)))
    }


def _kind(part: nn.Module, numbered: dict[int, int]) -> tuple:
    """All that compiled code depends on in a part. No stage reads the window."""
    settings = tuple((key, value) for key, value in _settings(vars(part)).items() if key != "window")
    tensors = [(key, x) for key, x in (*part._parameters.items(), *part._buffers.items()) if x is not None]
    forms = [(key, type(x), x.shape, x.stride(), x.dtype, x.device) for key, x in tensors]
    return type(part), settings, tuple(forms), tuple(numbered.setdefault(id(x), len(numbered)) for _, x in tensors)
