"""The README's `python tools/...` lines run as printed: the same options, on models that are tiny and for less long."""

import argparse
import copy
import importlib
import os
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from support import gguf_files
from support.readme import README, blocks
from support.tiny import hf_config, tiny_config
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.cli.commands import _parser
from tools.bench import __main__ as bench
from tools.bench import rivals as bench_rivals
from tools.bench import shapes as bench_shapes
from tools.checkpoints import make_random as make_random_checkpoint

BLOCKS = [block for block in blocks("bash") if "python -m tools." in block]
FEWER = {  # of some options, what to give instead of what is printed
    "--lengths": lambda text: re.sub(r"\d{4}|512", lambda number: str(int(number[0]) // 64), text),
    "--runs": lambda _: "1",
}
SHORT = "--text a=TEXT --calibration OTHER --windows 2 --prompt-tokens 64 --continuation-tokens 8"
ALSO = {"tools.evaluate": shlex.split(SHORT)}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROW_EYES = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}


def narrow(shape: dict) -> dict:
    """The config.json of a known shape: as deep, and narrow."""
    shape = copy.deepcopy(shape)
    shape.get("text_config", shape).update(NARROW)
    shape.get("vision_config", {}).update(NARROW_EYES)
    return shape


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """A folder to run in, where the README's models and files are tiny and rivals and the harness are stand-ins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    for name in ("smollm2-135m", "llama3.1-8b"):
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "head_dim": 16}
        write_chat_checkpoint(tmp_path / "weights" / name, **sizes)
    (tmp_path / "TEXT").write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)))
    (tmp_path / "OTHER").write_text("Calibrated on this. " * 60)
    tensors = gguf_files.make_tensors()
    gguf_files.write_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", tensors, gguf_files.LLAMA_KEYS)
    monkeypatch.setattr(make_random_checkpoint, "_llama_config", lambda *_: hf_config(tiny_config()))
    for name, shape in bench_shapes.SHAPES.items():
        monkeypatch.setitem(bench_shapes.SHAPES, name, narrow(shape))
    monkeypatch.setattr(bench, "peak_turn", lambda *_: lambda: {"flops_per_s": 1e9})
    monkeypatch.setattr(bench, "bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e9})
    monkeypatch.setattr(bench, "SLOTS", (64, 128))
    monkeypatch.setattr(bench, "in_child", lambda *_: {"peak_bytes": 1, "formula_bytes": 1, "ratio": 1})
    for name in bench_rivals.RIVALS:
        monkeypatch.setitem(bench_rivals.RIVALS, name, lambda model, fields, gguf: [] if os.path.isfile(gguf) else None)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = object
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda model: HARNESS.setdefault(name, model)
    sys.modules["lm_eval.__main__"].cli_evaluate = harness


HARNESS = {}


def harness():
    """What the harness does with its arguments, as far as the model is concerned."""
    parser = argparse.ArgumentParser()
    for option in ("--model", "--model_args", "--tasks", "--batch_size"):
        parser.add_argument(option, required=True)
    for option in ("--apply_chat_template", "--confirm_run_unsafe_code"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    options = dict(pair.split("=") for pair in args.model_args.split(","))
    adapter = HARNESS[args.model].create_from_arg_obj(options, {"batch_size": args.batch_size})
    print("the harness has", len(adapter.generate_until([types.SimpleNamespace(args=("Hi", {"max_gen_toks": 2}))])))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"-m tools\.([\w.]+)", block)[1])
def test_the_lines_run_as_printed(block, tiny_world, monkeypatch, capsys):
    if "--quantize" in block:
        pytest.importorskip("torchao")
    variables = {}
    for line in block.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r'(\w+)="?(.*?)"?', line):
            variables[f"${assigned[1]}"] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(name, value)
        words = shlex.split(line)
        while "=" in words[0]:  # an environment variable's
            words.pop(0)
        assert words[:2] == ["python", "-m"]
        script = words[2]
        words = words[3:]
        words = [FEWER.get(before, str)(word) for before, word in zip(["", *words], words, strict=False)]
        words += ALSO.get(script, [])
        tool = importlib.import_module(
            {"tools.bench": "tools.bench.__main__", "tools.evaluate": "tools.evaluate.__main__"}.get(script, script)
        )
        monkeypatch.setattr(sys, "argv", [script, *words])
        assert not tool.main(), (line, capsys.readouterr().err)
        assert capsys.readouterr().out.strip() or Path(words[1]).is_file(), line


def test_every_block_of_commands_is_of_a_kind_that_a_test_runs():
    """The others are test_readme's and test_parallel's."""
    kinds = {"python": "-m tools.", "pop": "", "pip": "install", "torchrun": "", "HF_ALLOW_CODE_EVAL=1": "python"}
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            first, _, rest = line.partition(" ")
            assert re.fullmatch(r'\w+=("[^"]*"|\S*)', line) or rest.strip().startswith(kinds[first]), line


COMMANDS = sorted({line for line in re.findall(r"`pop ([^`]+)`", README) if " " in line})


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_in_the_text_are_ones(line):
    """Their words are understood; what the commands do is tested by other files, with models and files that exist."""
    args = _parser().parse_args(shlex.split(line.replace(" ...", "")))
    assert args.__dict__.get("model", "smollm2-135m") in pop.list_models()
