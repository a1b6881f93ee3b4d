"""Detects changes to a module: new weights, classes or hooks. Compiled code and captured graphs would ignore them.

Other attributes, such as a norm's eps, are not looked at. After a change of one, call `model.recompile()`.
"""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter

from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle

from pop.models.base import PrunableModel


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """All modules inside a layer, by name. Of a model: those outside of its layers."""
    inner = [*module.layers, *module.tower] if isinstance(module, PrunableModel) else []
    left_out = {part for other in inner for part in other.modules()}
    return dict(module.named_modules(memo=left_out))


def sizes_of(weights: list[Tensor]) -> list:
    """The dtypes, shapes and strides of weights, and the bytes of memory that each is in. Each map is a loop in C."""
    return [
        *map(attrgetter("dtype", "shape"), weights),
        *map(Tensor.stride, weights),
        *map(UntypedStorage.nbytes, map(Tensor.untyped_storage, weights)),
    ]


class LayerSnapshot:
    """A layer's weights, classes and hooks at one time. Raises RuntimeError if a weight reaches beyond its memory."""

    def __init__(self, layer: nn.Module):
        self.named = parts_of(layer)
        self.parts = list(self.named.values())
        self.hooks = [_global_forward_hooks, _global_forward_pre_hooks]  # those that calls of the parts run
        for part in self.parts:
            self.hooks += [part._forward_hooks, part._forward_pre_hooks]
        self.tables = [table for part in self.parts for table in (part._modules, part._parameters, part._buffers)]
        self.entries = self._entries()
        self.weights = [entry for entry in self.entries if type(entry) in (nn.Parameter, Tensor)]
        self.sizes = sizes_of(self.weights)
        self.memory = [weight.untyped_storage() for weight in self.weights]  # which a captured step may read
        self.facts = self._facts()
        for weight in self.weights:
            weight.squeeze()  # raises if the weight reaches beyond its storage, which a product would read

    def unchanged(self) -> bool:
        """Whether the layer is as it was, apart from values of weights that changed in place."""
        return self.fits() and self._facts() == self.facts

    def fits(self) -> bool:
        """Whether the weights lie in memory as they did. Compiled code reads them so."""
        return sizes_of(self.weights) == self.sizes

    def _entries(self) -> list:
        """All modules and tensors inside."""
        return list(chain.from_iterable(map(dict.values, self.tables)))

    def _facts(self) -> list:
        """What may change, besides sizes. Each map is a loop in C. `entries` keeps its objects, so their ids stay."""
        return [
            *map(id, self._entries()),
            *map(type, self.parts),
            *map(len, self.hooks),
            *map(Tensor.data_ptr, self.weights),
        ]

    def kind(self) -> tuple | None:
        """All that compiled code depends on in the layer, except for the values of its weights. None as in `Kinds`."""
        if any(self.hooks) or any("forward" in vars(part) for part in self.parts):
            return None
        tied: dict[int, int] = {}  # which tensors are the same one
        kind = []
        for name, part in self.named.items():
            # Names with an underscore are torch's, or belong to caches. No stage reads the window.
            settings = {key: value for key, value in vars(part).items() if key[0] != "_" and key != "window"}
            kind.append((name, type(part), *settings.items()))
            for key, x in (*part._parameters.items(), *part._buffers.items()):
                if x is not None:
                    number = tied.setdefault(id(x), len(tied))
                    kind.append((key, type(x), x.shape, x.stride(), x.dtype, x.device, number))
        try:
            hash(tuple(kind))
        except TypeError:  # lists, dicts and sets have no hash
            return None
        return tuple(kind)


class Kinds(dict[nn.Module, int | None]):
    """The number of each layer's kind. Layers of one kind differ in the values of their weights only.

    None: the layer has hooks, a `forward` set from outside, or a list, dict or set. It can only run as it is.
    """

    def __init__(self):
        self.numbers: dict[tuple, int] = {}
        self.forget()

    def forget(self) -> None:
        """Let the next question find a change."""
        self.snapshots: dict[nn.Module, LayerSnapshot] = {}
        self.newest_hook = None

    def take_snapshots(self, layers: Iterable[nn.Module]) -> None:
        """Number the layers as they are now. A kind that has been there before keeps its number."""
        self.clear()
        self.forget()
        # Each new hook of the process has a new id. It is read first, so that a hook that comes meanwhile is found, and
        # set last, so that after an error the next question finds a change.
        newest_hook = RemovableHandle.next_id
        for layer in layers:
            self._take_snapshot(layer)
        self.newest_hook = newest_hook

    def _take_snapshot(self, layer: nn.Module) -> None:
        snapshot = LayerSnapshot(layer)
        self.snapshots[layer] = snapshot
        kind = snapshot.kind()
        self[layer] = None if kind is None else self.numbers.setdefault(kind, len(self.numbers))

    def of(self, layer: nn.Module) -> int | None:
        """The kind of a layer, which is looked at anew if its weights are no longer what compiled code may read."""
        if layer in self.snapshots and not self.snapshots[layer].fits():
            self._take_snapshot(layer)
        return self.get(layer)

    def unchanged(self, compare: bool = True) -> bool:
        """Whether the layers are as they were. Unless `compare`, only new hooks of any module are looked for."""
        if self.newest_hook != RemovableHandle.next_id:
            return False
        return not compare or all(one.unchanged() for one in self.snapshots.values())
