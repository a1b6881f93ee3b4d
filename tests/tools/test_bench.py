"""`python -m tools.bench`: the command line end to end, and the processes that it starts."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from support.tiny import hf_config, tiny_config, write_checkpoint
from torch._inductor.runtime.cache_dir_utils import cache_dir

import pop
from pop.checkpoints.config_json import read_config
from pop.pruning import cost
from tools.bench import __main__ as bench
from tools.bench import measure, processes, shapes


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Rates of the machine, given instead of measured."""
    monkeypatch.setattr(measure, "peak_turn", lambda *_: lambda: {"flops_per_s": 1e9})
    monkeypatch.setattr(measure, "bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e9})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured under Linux")
def test_memory_is_what_the_formula_says(tmp_path, monkeypatch):
    """A prefill of 700 tokens in a fresh process. A third of its memory is activations."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = tiny_config(
        hidden_size=512, intermediate_size=2048, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64,
        max_positions=4096, dtype=torch.float32,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    argv = ["--shape", str(tmp_path), "--lengths", "700", "--compile", "false", "--device", "cpu"]
    found = processes.in_child("memory", argv, cache_dir())  # which has the compiled kernels
    assert found["formula_bytes"] == shapes.prefill_memory(config, 700, torch.float32)
    assert found["ratio"] == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A folder with the shape of a tiny Qwen3-VL: an image of 256 x 256 pixels has 64 tokens."""
    folder = tmp_path_factory.mktemp("seeing")
    shape = copy.deepcopy(shapes.SHAPES["qwen3-vl-8b"])
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape["text_config"] |= text | {"num_key_value_heads": 1, "vocab_size": 151_700, "dtype": "float32"}
    vision = {"hidden_size": 24, "intermediate_size": 40, "depth": 3, "num_heads": 3, "out_hidden_size": 32}
    shape["vision_config"] |= vision | {"num_position_embeddings": 25, "deepstack_visual_indexes": [1]}
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)


def test_prompts_may_begin_with_an_image(seeing, capsys):
    """Its tower is in TTFT, in the FLOPs and in the limit."""
    options = (
        "--layers 4 --lengths 80 --prune 0.5 --runs 2 --decode-steps 1 --tasks prefill --compile false --device cpu"
    )
    assert bench.main(["--shape", seeing, "--image", "256x256", *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "vision tower, an image of 256 x 256 pixels" in printed
    figures = json.loads(printed.splitlines()[-1])["prefill"]["80"]
    config, none = read_config(Path(seeing)), pop.PrunePlan.none()
    full = cost.prefill_flops(config, 80, none, [256])
    flops = full - cost.prefill_flops(config, 80, none)
    tower = figures["tower"]
    assert tower["flops_share"] == flops / full
    limit = full / (cost.prefill_flops(config, 80, pop.PrunePlan((2, 3))) + flops)
    assert figures["plans"]["0.5"]["limit"] == pytest.approx(limit)
    share = tower["share"]["median"]
    assert share > 0
    assert tower["ratio"]["median"] == pytest.approx(share * full / flops)


def test_the_command_line_end_to_end(folder, tmp_path, capsys, monkeypatch):
    children = []

    def in_child(what, argv, cache, extra=()):
        children.append((what, *extra))
        return {"seconds": 1.0, "compiled": True, "peak_bytes": 3e9, "formula_bytes": 2e9, "ratio": 1.5}

    monkeypatch.setattr(bench, "in_child", in_child)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # words as words
    path, drawn = tmp_path / "r.json", tmp_path / "r.svg"
    options = (
        f"--layers 4 --lengths 16,8 --runs 1 --decode-steps 2 --prune 0.5 --dtype bfloat16 --device cpu --plot {drawn}"
    )
    assert bench.main(["--shape", folder, *options.split(), "--json", str(path)]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert json.loads(path.read_text()) == result
    assert children == [("compile",), ("compile",), ("memory", "--lengths", "8"), ("memory", "--lengths", "16")]
    assert (result["layers"], result["all_layers"], result["dtype"], result["compiled"]) == (4, 5, "bfloat16", False)
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["versions"]["pop"] == pop.__version__
    assert list(result["cold"]) == list(result["prefill"]) == ["8", "16"]
    (plan,) = result["prefill"]["8"]["plans"].items()
    assert (plan[0], plan[1]["layers"]) == ("0.5", 2)
    for text in ("4 layers of 5", "0.5, without 2 layers", "1.0 s cold", "1.500", "first time"):
        assert text in out
    assert "with 32,768 slots against 2,048" in out
    for text in ("all layers", "0.5", "time to first token, seconds"):
        assert f">{text}<" in drawn.read_text()


def test_a_child_measures_in_its_process(folder, capsys):
    argv = ["--model", folder, "--lengths", "8", "--compile", "false", "--device", "cpu", "--child", "compile"]
    assert bench.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compiled"] is False and result["seconds"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model a --shape b", "both given"),
        ("--model a --layers 2", "--layers shortens a --shape"),
        ("--shape nothing", "give one of llama3.1-8b, smollm2-135m, qwen3-vl-8b, gemma3-12b, or a folder"),
        ("--shape FOLDER --layers 9", "--layers is 9, but .* has 5"),
        ("--lengths 12,x", "--lengths is '12,x'"),
        ("--lengths 0", "the shortest of --lengths is 0"),
        ("--runs 0", "--runs is 0"),
        ("--tasks all", "--tasks holds 'all'; it knows compile, memory"),
        ("--against vllm", "--against holds 'vllm'; it knows transformers, transformers-compiled, llama.cpp"),
        ("--json /nowhere/r.json", "cannot be written"),
        ("--plot r.pdf", "ends in .svg or .png"),
        ("--plot r.svg --tasks slots", "--plot .* --tasks"),
        ("--model FOLDER --lengths 511 --decode-steps 2", "has 513 tokens, but the model takes 512"),
        ("--model FOLDER --prune none", "prunes none"),
        ("--model FOLDER --against llama.cpp", "llama-cpp-python"),
        ("--image 256", "--image is '256'; write width and height"),
        ("--image 0x9", "--image is '0x9'"),
        ("--image 256x256 --against transformers", "--against compares text prompts"),
        ("--image 256x256 --shape SEEING --lengths 66 --prune 1.0", "the image has 66 tokens; make --lengths longer"),
        ("--image 256x256 --shape FOLDER --lengths 99", "the llama family does not"),
    ],
)
def test_bad_input_is_one_sentence(folder, seeing, argv, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    argv = argv.replace("FOLDER", folder).replace("SEEING", seeing)
    assert bench.main(["--lengths", "8", "--tasks", "prefill", "--compile", "false", *argv.split()]) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert out == "" and line.startswith("bench: ")
    assert re.search(message, line)


def test_a_child_that_fails_says_why(monkeypatch):
    done = subprocess.CompletedProcess([], 2, "", "loading\nbench: no model\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(pop.InputError, match=r"measures memory failed \(bench: no model\); leave memory out"):
        processes.in_child("memory", [], "")
