"""Marks for tests that need torch.compile to work on this machine, or a new torch."""

import pytest
import torch


def _compiler_works() -> bool:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception:
        return False
    return True


# torch 2.6 and 2.8 compile again in other cases, and torchao and Triton's interpreter need a newer torch.
IS_OLD = torch.__version__ < "2.9"
requires_new_torch = pytest.mark.skipif(IS_OLD, reason="torch is older than 2.9")
requires_compiler = pytest.mark.skipif(not _compiler_works(), reason="torch cannot compile on this machine")
