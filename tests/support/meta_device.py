"""The meta device as a stand-in for a GPU whose host may not take part, as in a captured CUDA graph.

    with META:
        module = build(config)
    with device_only():
        module.embed(torch.zeros(1, 1, dtype=torch.int64, device=META))

Tensors on the meta device have shapes but no values, so this runs on any build of torch.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}
READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # such as .item() and nonzero()
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}


@contextmanager
def device_only():
    """Rejects operations that move values between host and device, or whose result's shape depends on values.

    It also rejects tensors on the CPU, except numbers (without dimensions), which a graph keeps as they are.
    """
    with _Functions(), _Operations():
        yield


class _Functions(TorchFunctionMode):
    """Operations are seen below. This one is not, but copies numbers from the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in FROM_NUMBERS and out.device == META:
            raise RuntimeError(f"{function.__name__} copies from the host; use new_full for a constant")
        return out


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {x.device for x in tensors} | {kwargs.get("device") or META}
        if any(x.device.type == "cpu" and x.dim() for x in tensors):
            raise RuntimeError(f"{function} takes a tensor on the CPU")
        if name in ("aten::_to_copy", "aten::copy_") and len(devices) > 1:
            raise RuntimeError(f"{function} copies between host and device")
        if name in INDEXING:
            if any(x is not None and x.dtype == torch.bool for x in args[1]):
                raise RuntimeError(f"{function} has a boolean index, so the host waits to learn the result's shape")
        elif READS_VALUES & {*function.tags}:
            raise RuntimeError(f"{function} makes the host wait for values")
        return function(*args, **kwargs)
