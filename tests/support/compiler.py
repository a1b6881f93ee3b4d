"""A mark for tests that need torch.compile to work on this machine."""

import pytest
import torch


def _compiler_works() -> bool:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception:
        return False
    return True


requires_compiler = pytest.mark.skipif(not _compiler_works(), reason="torch cannot compile on this machine")
