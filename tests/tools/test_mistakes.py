"""Each tool tells a mistake in one sentence on stderr, prints nothing else, exits with 2, and leaves no file."""

import importlib
import shlex
import sys

import pytest
import torch
from support.adapters import write_adapter
from support.meta_files import from_meta
from support.tiny import random_model, tiny_config, write_checkpoint

import pop
from tools.evaluate import __main__ as evaluate

CALIBRATED = "--text a=TEXT --prune calibrated:0.5"
MISTAKES = {
    "tools.bench.__main__": {
        "--model a --shape b": "both given",
        "--model a --layers 2": "--layers shortens a --shape",
        "--shape nothing": "give one of llama3.1-8b, smollm2-135m",
        "--shape BASE --layers 9": "--layers is 9, but",
        "--lengths 12,x": "--lengths is '12,x'",
        "--lengths 0": "the shortest of --lengths is 0",
        "--runs 0": "--runs is 0",
        "--tasks all": "--tasks holds 'all'; it knows compile, memory",
        "--against vllm": "--against holds 'vllm'; it knows transformers, transformers-compiled, llama.cpp",
        "--json /nowhere/r.json": "cannot be written",
        "--plot r.pdf": "ends in .svg or .png",
        "--model BASE --lengths 511 --decode-steps 2": "has 513 tokens, but the model takes 512",
        "--model BASE --prune none": "prunes none",
        "--model BASE --against llama.cpp --gguf x": "llama-cpp-python",
        "--image 256": "--image is '256'; write width and height",
        "--image 0x9": "--image is '0x9'",
        "--image 256x256 --against transformers": "--against compares text prompts",
        "--image 256x256 --shape SEEING --lengths 66 --prune 1.0": "the image has 66 tokens; make --lengths longer",
        "--image 256x256 --shape BASE --lengths 99": "the llama family does not",
    },
    "tools.checkpoints.make_random": {
        "llama9 NEW": "'llama9'",
        "BASE/config.json NEW --layers 0": "--layers is 0",
        "BASE/config.json BASE": "base",
        "BROKEN NEW": "broken.json",
    },
    "tools.checkpoints.measure": {"BROKEN": "broken.json"},
    "tools.convert.__main__": {
        "META": "DIR is missing",
        "smollm2-135m --adapter ADAPTER": "DIR is missing",
        "missing NEW": "neither a GGUF file nor a folder with Meta's params.json",
        "BASE NEW": "neither a GGUF file nor a folder with Meta's params.json",
        "META BASE": "exists already",
        "BASE/config.json NEW --adapter ADAPTER": "is a file",
        "META NEW --adapter ADAPTER": "lacks config.json",
        "BASE NEW --adapter missing": "adapter_config.json",
        "ADAPTER NEW --adapter ADAPTER": "holds a LoRA adapter",
    },
    "tools.demo": {
        "": "could not be fetched; connect",
        "--model llama3.1-405b": "meta-llama/Llama-3.1-405B",
        "--model CHAT --runs 0": "runs is 0",
        "--model CHAT --prompt-file LONG --json": "tokens, but the model takes 1024",
        "--model CHAT --prompt-file missing.txt": "missing.txt cannot be read",
        "--model BASE --json": "the checkpoint has none",
    },
    "tools.evaluate.__main__": {
        "--tasks text,chess": "'chess'",
        "--tasks human-eval": "--run-generated-code",
        "--tasks text --plot x.svg": "have both in --tasks",
        "--json /nowhere/r.json": "/nowhere/r.json cannot be written",
        "--windows 0": "--windows is 0",
        "--plot x.nonsense": "ends in .svg or .png",
        "--plot x.svg": "pip install",
        "--baselines shortgpt:1": "would remove every layer",
        "--baselines nonsense": "it knows shortgpt",
        "--baselines no-kv:x": "write NAME or NAME:FRACTION",
        "--text prose": "--text is 'prose'",
        "--text x=/nowhere.txt": "/nowhere.txt cannot be read",
        "--text a=SHORT --prompt-tokens 200": "has 5 tokens, less than a window of 328",
        "--prompt-tokens 900": "a window has 1028 tokens",
        "--prune 0.4 --prune 0.4": "the same name",
        "--tasks ruler --lengths long": "--lengths is 'long'",
        "--text a=TEXT --lengths 64": "the prompts of retrieval are too short",
        f"{CALIBRATED} --calibration TEXT": "both calibration and test text",
        f"--prune calibrated:0.5 --text a={evaluate.BUILTIN[0]}": "both calibration and test text",
    },
    "tools.evaluate.lookup": {"--share 0": "--share is 0.0", "--last 0": "--last is 0", "--last 699": "the last 699"},
    "tools.evaluate.lm_eval_pop": {"": "pip install"},
    "tools.examples.json_schema": {"Hi --model CHAT": "pip install llguidance"},
    "tools.gpu_report.__main__": {
        "": "no GPU",
        "speed --device cpu": "'speed'",
        "--device cpu --layers 0": "layers is 0",
        "--device cpu --limit 0": "--limit is 0",
    },
    "tools.plot_importance": {"missing.json other.svg": "missing.json"},
    "tools.results.rows": {"missing.json": "missing.json", "LONG": "long.txt", "BROKEN": "broken.json"},
    "tools.transformers_check": {"--check": "pip install 'transformers"},
}
ALSO = {
    "tools.bench.__main__": "--lengths 8 --tasks prefill --compile false",
    "tools.evaluate.__main__": "--model CHAT",
    "tools.evaluate.lookup": "--model CHAT --text a=TEXT --lengths 700 --questions 2",
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
    (folder / "short.txt").write_text("short")
    (folder / "long.txt").write_text("a" * 2000)
    (folder / "text.txt").write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)))
    return folder


@pytest.mark.parametrize(("tool", "words", "said"), CASES)
def test_a_mistake_is_one_sentence(tool, words, said, folder, tiny_folder, seeing, tmp_path, monkeypatch, capsys):
    def no_network(model, file):
        raise pop.DownloadError(f"{file.stem} could not be fetched; connect")

    monkeypatch.setattr("pop.checkpoints.registry._places", lambda: [folder.parent / "weights"])
    monkeypatch.setattr("tools.convert.packages._download", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for library in ("llama_cpp", "llguidance", "lm_eval", "matplotlib", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    names = {"BASE": "base", "META": "meta", "ADAPTER": "adapter", "BROKEN": "broken.json"}
    names |= {"SHORT": "short.txt", "LONG": "long.txt", "TEXT": "text.txt", "NEW": "new"}
    paths = {name: str(folder / file) for name, file in names.items()} | {"CHAT": tiny_folder, "SEEING": seeing}
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
