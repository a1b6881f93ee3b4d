"""The installed package is found wherever Python is started."""

import subprocess
import sys

import pytest


def imported(folder) -> str:
    """The file that `import pop` runs in a Python that is started in a folder, or "None"."""
    find = "import importlib.util; print(getattr(importlib.util.find_spec('pop'), 'origin', None))"
    command = [sys.executable, "-c", find]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_a_folder_named_pop_does_not_hide_the_package(tmp_path):
    """Such as a clone of this project in the current folder."""
    installed = imported(tmp_path)
    if installed == "None\n":
        pytest.skip("the package is not installed, as with `pip install -e .`")
    (tmp_path / "pop").mkdir()
    assert imported(tmp_path) == installed
