"""The modes of torch in which calls run, whatever the caller's are."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Compute in the dtypes of the weights. Autocast would change those of products, but not those of caches."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Make tensors on the CPU where no device is stated, whatever torch.set_default_device says."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):  # slows each operator down
        yield


@contextlib.contextmanager
def engine_modes() -> Iterator[None]:
    """No autocast, no gradients, and tensors that can be used in inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad(), no_autocast(), cpu_by_default():
        yield
