"""The devices that tests run on. `pytest -m cuda` runs those that need a GPU.

The fixture `device` of conftest.py runs a test on each of DEVICES. A test that makes sense on a GPU only has the mark
`cuda`.
"""

import pytest
import torch

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.cuda)]


def no_gpu() -> str | None:
    """Why tests with the mark `cuda` are skipped. None: there is a GPU."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_name().startswith("FAKE"):
        return "the GPU is a stand-in that computes nothing"
    return None
