"""The `python -m tools...` lines of every README.md run as printed: with the same options, on tiny models."""

import argparse
import copy
import importlib
import json
import os
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import pytest
from support import gguf_files, meta_files
from support.adapters import write_adapter
from support.harness import stand_in
from support.readme import READMES, blocks
from support.tiny import hf_config, random_model, tiny_config
from support.tiny_chat import write_chat_checkpoint

from pop import PrunePlan
from pop.pruning.plan import SHIPPED
from tools.bench import __main__ as bench
from tools.bench import measure, rivals, shapes
from tools.checkpoints import make_random
from tools.serve import kept_logits

BLOCKS = [
    (path, block)
    for path in READMES
    for block in blocks("bash", path)
    if "python -m tools." in block
    and not block.startswith("pip install ")  # .ci/run runs it
    and "tools.serve " not in block  # test_serve.py runs it
    and "tools.examples.micro_pop" not in block  # test_micro_pop.py runs it
]
FEWER = {  # option -> what to give instead of what is printed
    "--lengths": lambda text: re.sub(r"\d{4}|512", lambda number: str(int(number[0]) // 64), text),
    "--layers": lambda _: "4",
    "--prune": lambda text: re.sub(r":(1\d|5)$", ":1", text),  # the selecting layer
}
# Options that follow the printed ones and so replace them.
SHORT = "--text a=TEXT --calibration OTHER --windows 2 --prompt-tokens 64 --continuation-tokens 8 --runs 1"
ALSO = {
    "tools.bench": shlex.split("--runs 1 --decode-steps 1"),
    "tools.evaluate": shlex.split(f"{SHORT} --lengths 800 --questions 1"),
    "tools.demo": shlex.split("--runs 1 --max-new-tokens 2 --prompt-file QUESTION"),
    "tools.evaluate.lookup": shlex.split("--text a=TEXT --lengths 800 --questions 1"),
    "tools.examples.agent_trace": shlex.split("--turns 2 --tokens 100,200"),
    "tools.serve.kept_logits": shlex.split("--turns 2 --new-tokens 2 --no-compile"),
    "tools.fuzz": ["--minutes", "0"],
    "tools.gpu_report": shlex.split("--child prefill --device cpu --layers 4 --lengths 8"),
}
CHECKS = {"tools.transformers_pop": "transformers", "tools.evaluate.lm_eval_check": "lm_eval"}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROW_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}


def narrow(shape: dict) -> dict:
    """The config.json of a known shape, narrow and not deep."""
    shape = copy.deepcopy(shape)
    shape.get("text_config", shape).update(NARROW, num_hidden_layers=8)
    shape.get("vision_config", {}).update(NARROW_TOWER)
    return shape


@pytest.fixture
def tiny_world(tmp_path, monkeypatch, given_rates):
    """A folder in which the models and files of the READMEs are tiny, and other libraries have stand-ins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "head_dim": 16}
    for name in ("smollm2-135m", "llama3.1-8b", "llama3.1-8b-instruct", "gemma3-270m"):
        write_chat_checkpoint(tmp_path / "weights" / name, **sizes)
    (tmp_path / "TEXT").write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)))
    (tmp_path / "QUESTION").write_text("Why is the sky blue?")
    (tmp_path / "OTHER").write_text("Calibrated on this. " * 60)
    said = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "It scatters light."}]
    (tmp_path / "log.jsonl").write_text(json.dumps({"messages": said}))
    (tmp_path / "tools" / "figures").mkdir(parents=True)
    (tmp_path / "pop" / "data" / "plans").mkdir(parents=True)
    monkeypatch.setattr("pop.pruning.plan.SHIPPED", tmp_path / "pop" / "data" / "plans")
    for path in Path(SHIPPED).glob("*.plan"):  # their layers do not fit the tiny model
        PrunePlan.deepest(5, 1 / 5).save(tmp_path / "pop" / "data" / "plans" / path.name)
    tensors = gguf_files.make_tensors()
    gguf_files.write_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", tensors, gguf_files.LLAMA_KEYS)
    meta_files.from_meta(tmp_path / "Llama3.1-8B")
    write_adapter(tmp_path / "my-adapter", random_model(tiny_config(vocab_size=259, **sizes)))
    monkeypatch.setattr(make_random, "_llama_config", lambda *_: hf_config(tiny_config()))
    for name, shape in shapes.SHAPES.items():
        monkeypatch.setitem(shapes.SHAPES, name, narrow(shape))
    monkeypatch.setattr(measure, "SLOTS", (64, 128))
    monkeypatch.setattr(kept_logits, "PASSAGE", 60)
    child = {"peak_bytes": 1, "formula_bytes": 1, "ratio": 1, "seconds": 1.0, "compiled": True}
    monkeypatch.setattr(bench, "in_child", lambda *_: child)
    for name in rivals.RIVALS:
        monkeypatch.setitem(rivals.RIVALS, name, lambda model, fields, gguf: [] if os.path.isfile(gguf) else None)
    registered = stand_in(monkeypatch)
    sys.modules["lm_eval.__main__"].cli_evaluate = lambda: harness(registered)


def harness(registered):
    """Do with the arguments what the harness does, as far as the model is concerned."""
    parser = argparse.ArgumentParser()
    for option in ("--model", "--model_args", "--tasks", "--batch_size"):
        parser.add_argument(option, required=True)
    parser.add_argument("--include_path")
    for option in ("--apply_chat_template", "--confirm_run_unsafe_code"):
        parser.add_argument(option, action="store_true")
    args = parser.parse_args()
    options = dict(pair.split("=") for pair in args.model_args.split(","))
    adapter = registered[args.model].create_from_arg_obj(options, {"batch_size": args.batch_size})
    print("the harness has", len(adapter.generate_until([types.SimpleNamespace(args=("Hi", {"max_gen_toks": 2}))])))


def commands(block: str) -> list[list[str]]:
    """The words of each command after `python -m`, with the block's variables filled in."""
    variables, found = {}, []
    for line in block.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r'(\w+)="?(.*?)"?', line):
            variables[f"${assigned[1]}"] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(name, value)
        words = shlex.split(line)
        while "=" in words[0]:  # an environment variable
            words.pop(0)
        assert words[:2] == ["python", "-m"], line
        found.append(words[2:])
    return found


def run(script: str, words: list[str], monkeypatch, capsys) -> None:
    words = [FEWER.get(before, str)(word) for before, word in zip(["", *words], words, strict=False)]
    words += ALSO.get(script, [])
    monkeypatch.setattr(sys, "argv", [script, *words])
    if script.startswith("tools.goldens.") or script in CHECKS:
        # They run other libraries: only that they start, and miss those, is tested.
        library = CHECKS.get(script, "transformers")
        for name in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, script, raising=False)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(script, run_name="__main__")
        assert library in f"{stopped.value} {capsys.readouterr().err}"
    elif script == "tools.examples.nano_gpt":
        runpy.run_module(script, run_name="__main__")
    else:
        package = script in ("tools.bench", "tools.convert", "tools.evaluate", "tools.fuzz", "tools.gpu_report")
        tool = importlib.import_module(f"{script}.__main__" if package else script)
        assert not tool.main(), (words, capsys.readouterr().err)
        assert capsys.readouterr().out.strip() or Path(words[1]).is_file(), words


@pytest.mark.parametrize(("path", "block"), BLOCKS, ids=lambda value: value[:60].split("\n")[0])
def test_the_lines_run_as_printed(path, block, tiny_world, monkeypatch, capsys):
    if "--plot" in block:
        pytest.importorskip("matplotlib")
    for script, *words in commands(block):
        run(script, words, monkeypatch, capsys)


def test_every_block_of_commands_is_of_a_kind_that_a_test_runs():
    """Those that are not of tools are run by test_readme.py, test_serve.py and tests/backends.

    tools/vllm is a distribution of its own, with tests of its own.
    """
    kinds = {"python": "-m tools.", "pop": "", "pip": "install", "torchrun": "", "curl": "http://127.0.0.1:8000/"}
    for block in [block for path in READMES if path != "tools/vllm/README.md" for block in blocks("bash", path)]:
        for line in block.replace("\\\n", " ").splitlines():
            if re.fullmatch(r'\w+=("[^"]*"|\S*)', line):
                continue
            first, _, rest = re.sub(r"^(\w+=\S+ )+", "", line).partition(" ")
            assert first in kinds and rest.strip().startswith(kinds[first]), line


def test_each_tool_has_a_readme_that_prints_its_command():
    """Of bench, evaluate, goldens and checkpoints: each script that can be run is in its folder's README.md."""
    root = Path(__file__).parents[2]
    for path in root.glob("tools/*/*.py"):
        if '__name__ == "__main__"' not in path.read_text(encoding="utf-8") or path.parent.name in ("examples", "vllm"):
            continue
        name = f"tools.{path.parent.name}" + ("" if path.stem == "__main__" else f".{path.stem}")
        text = READMES[f"tools/{path.parent.name}/README.md"]
        assert f"python -m {name} " in text or f"{name}\n" in text or f"[{path.name}]" in text, path
