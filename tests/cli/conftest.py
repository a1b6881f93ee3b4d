"""The `pop` command in this process."""

import pytest

from pop.cli import main


@pytest.fixture
def run(capsys):
    """run(*words, status=0) runs `pop` with these words, and returns what it prints: (stdout, stderr)."""

    def run(*words, status=0):
        assert main([*map(str, words)]) == status
        return capsys.readouterr()

    return run
