"""The `pop` command in this process, and a tiny model for it."""

import pytest
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.cli import main


@pytest.fixture
def run(capsys):
    """run(*words, status=0) runs `pop` with these words, and returns what it prints: (stdout, stderr)."""

    def run(*words, status=0):
        assert main([*map(str, words)]) == status
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of six layers, whose generation_config.json states how to sample."""
    folder = write_chat_checkpoint(tmp_path_factory.mktemp("models") / "chat", num_layers=6)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 5.0, "top_k": 9}')
    return str(folder)


@pytest.fixture(scope="module")
def model(folder):
    return pop.load(folder)
