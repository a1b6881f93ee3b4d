"""`pop` and each tool tell a mistake in one sentence, print nothing else, exit with 2, and leave no file."""

import importlib
import io
import json
import shlex
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import write_adapter
from support.goldens import GOLDENS
from support.meta_files import from_meta
from support.tiny import random_model, tiny_config, write_checkpoint
from support.tiny_chat import write_chat_checkpoint

import pop
from tools.evaluate import __main__ as evaluate

# By tool: the words of a command, and what the error says.
MISTAKES = json.loads((GOLDENS / "mistakes.json").read_bytes())
ALSO = {
    "tools.bench.__main__": "--lengths 8 --tasks prefill --compile false",
    "tools.evaluate.__main__": "--model CHAT",
    "tools.evaluate.lookup": "--model CHAT --text a=TEXT --lengths 700 --questions 2",
    "tools.examples.agent_trace": "--model CHAT --prune 0.5 --turns 2 --tokens 200,300",
}
CASES = [(tool, words, said) for tool, cases in MISTAKES.items() for words, said in cases.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of models and of files, some of which are broken."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_checkpoint(folder / "base")
    from_meta(folder / "meta")
    write_adapter(folder / "adapter", random_model(tiny_config()))
    (folder / "broken.json").write_text("[]")
    pop.Importance([1.0], [1.0], [0.1], [0.1], 5).save(folder / "scores.json")
    (folder / "short.txt").write_text("short")
    (folder / "long.txt").write_text("a" * 2000)
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("a")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    (folder / "log.jsonl").write_text(json.dumps({"messages": said}))
    (folder / "open.jsonl").write_text(json.dumps({"messages": said[:1]}))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff\xfe")
    write_chat_checkpoint(folder / "nan")
    weights = load_file(folder / "nan/model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "nan/model.safetensors")
    (folder / "text.txt").write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)))
    return folder


@pytest.mark.parametrize(("tool", "words", "said"), CASES)
def test_a_mistake_is_one_sentence(tool, words, said, folder, tiny_folder, seeing, tmp_path, monkeypatch, capsys):
    def no_network(model, file, progress):
        raise pop.DownloadError(f"{file.stem} could not be fetched; connect")

    monkeypatch.setattr("pop.checkpoints.registry.places", lambda: [folder.parent / "weights"])
    monkeypatch.setattr("tools.convert.packages._download", no_network)
    monkeypatch.setattr("pop.calibration.texts.PER_INPUT", 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for library in ("llama_cpp", "llguidance", "lm_eval", "matplotlib", "transformers", "vllm"):
        monkeypatch.setitem(sys.modules, library, None)
    paths = {path.stem.upper(): str(path) for path in folder.iterdir()}  # SHORT is the path of short.txt
    paths |= {"NEW": str(folder / "new"), "CHAT": tiny_folder, "SEEING": seeing}
    paths["BUILTIN"] = str(shutil.copy(evaluate.BUILTIN[0], folder / "copy.txt"))
    words = f"{ALSO.get(tool, '')} {words}"
    for name, path in paths.items():
        words = words.replace(name, path)
    monkeypatch.setattr(sys, "argv", [tool, *shlex.split(words)])
    monkeypatch.chdir(tmp_path)
    files = sorted(folder.rglob("*"))
    assert importlib.import_module(tool).main() == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err.splitlines()[-1]
    assert sorted(folder.rglob("*")) == files and not any(tmp_path.iterdir())
