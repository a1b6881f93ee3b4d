"""`python -m tools.bench`: the command line end to end, and the processes that it starts."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from support.replay import Replay
from support.tiny import hf_config, tiny_config, tiny_model
from torch._inductor.runtime.cache_dir_utils import cache_dir

import pop
from pop import engine
from pop.backends.cuda_graph import CAPTURE_AT
from pop.checkpoints.config_json import read_config
from pop.pruning import cost
from tools.bench import __main__ as bench
from tools.bench import measure, processes, shapes
from tools.bench.tower import vision_flops

pytestmark = pytest.mark.usefixtures("given_rates")


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
    flops = vision_flops(config, [256])
    full = cost.prefill_flops(config, 80, none) + flops
    tower = figures["tower"]
    assert tower["flops_share"] == flops / full
    limit = full / (cost.prefill_flops(config, 80, pop.PrunePlan((2, 3))) + flops)
    assert figures["plans"]["0.5"]["limit"] == pytest.approx(limit)
    share = tower["share"]["median"]
    assert share > 0
    assert tower["ratio"]["median"] == pytest.approx(share * full / flops)


def test_the_command_line_end_to_end(tiny_folder, tmp_path, capsys, monkeypatch):
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
    assert bench.main(["--shape", tiny_folder, *options.split(), "--json", str(path)]) == 0
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


def test_short_prompts_are_measured_as_a_gpu_replays_them(monkeypatch):
    """But those that `measure_cold` measures are new."""
    model = tiny_model(tiny_config(num_layers=2), compile=False)
    model._stages.replay = Replay
    model._stages.replayed_tokens = 8
    prefill, calls = engine.prefill, []
    monkeypatch.setattr(engine, "prefill", lambda *args: calls.append(args[1].shape[1]) or prefill(*args))
    measure.measure_cold(model, [8], 1)
    assert calls == [8, 8]
    calls.clear()
    args = bench.parser().parse_args(["--lengths", "8,9", "--runs", "1", "--decode-steps", "1"])
    bench.check(args)
    measure.measure_prefill(model, {"plain": pop.PrunePlan((1,))}, [], args)
    assert [calls.count(tokens) for tokens in (8, 9)] == [2 * (CAPTURE_AT + 2), 2 * 2]


def test_a_child_that_fails_says_why(monkeypatch):
    """What is wrong with the options is wrong whatever is measured."""
    for status, line, said in (
        (2, "bench: no model", r"^no model \(in the process that measures memory\)$"),
        (1, "Killed", r"measures memory failed \(Killed\); leave memory out"),
    ):
        done = subprocess.CompletedProcess([], status, "", f"loading\n{line}\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(pop.InputError, match=said):
            processes.in_child("memory", [], "")
