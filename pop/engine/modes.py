"""The modes of torch in which calls run, whatever the caller's are."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_dtypes_and_devices() -> Iterator[None]:
    """Compute in the dtypes of the weights, and make tensors on the CPU where no device is stated.

    Autocast would change the dtypes of products, but not those of caches.
    """
    is_default = torch.empty(0).device == torch.device("cpu")  # get_default_device of torch 2.6 may fail
    on_cpu = contextlib.nullcontext() if is_default else torch.device("cpu")  # which slows each operator down
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), on_cpu:
        yield


@contextlib.contextmanager
def engine_modes() -> Iterator[None]:
    """No autocast, no gradients, and tensors that can be used in inference mode and outside of it."""
    with torch.inference_mode(False), torch.no_grad(), own_dtypes_and_devices():
        yield
