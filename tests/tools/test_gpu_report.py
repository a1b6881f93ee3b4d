"""`python -m tools.gpu_report` on the CPU, with a tiny model: its parts, its processes, and its table."""

import json
import re
import sys

import pytest
import torch
from support.tiny import write_checkpoint

from tools.bench import measure
from tools.gpu_report import __main__ as gpu_report
from tools.gpu_report import estimates, parts

ON_GPUS = {"waits", "kernels", "tests", "memory", "fa3", "fp8", "pdl", "products", "moe", "small"}


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """The options of a run on the CPU, with rates that are given instead of measured."""
    for module in (measure, parts):
        monkeypatch.setattr(module, "peak_turn", lambda *_: lambda: {"flops_per_s": 1e9})
        monkeypatch.setattr(module, "bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e9})
    monkeypatch.setattr(parts, "COLD", (5, 11))
    monkeypatch.setattr(parts, "POSITION", 20)
    monkeypatch.setattr(parts, "BATCHES", (3,))
    monkeypatch.setattr(parts, "LONG", 32)
    monkeypatch.setattr(parts, "KEYS", (512,))
    monkeypatch.setattr(parts, "L2", 1)
    folder = write_checkpoint(tmp_path / "tiny", num_layers=8, max_positions=4096)
    return ["--shape", str(folder), "--lengths", "8,16", "--device", "cpu", "--layers", "4"]


def measured(name, argv, capsys) -> list[dict]:
    """The lines of a part, in this process."""
    assert gpu_report.main(["--child", name, *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", [name for name in parts.PARTS if name not in ON_GPUS])
def test_a_part_measures_what_was_estimated(name, argv, capsys, monkeypatch):
    """Those that need no GPU, and attention with a stand-in for the kernel that does."""
    monkeypatch.setattr(parts.cuda, "fused_attention", lambda q, *_: torch.zeros(q.shape))
    *figures, last = measured(name, argv, capsys)
    assert last == {"part": name, "fallbacks": []}
    assert figures and all(line["part"] == name and line.keys() >= {"what", "value", "unit"} for line in figures)
    names = {re.sub(r"\d[\d,]*", "N", line["what"]) for line in figures}
    expected = {re.sub(r"\d[\d,]*", "N", what) for what in estimates.estimates()}
    assert names & expected or name in ("paths", "shipped", "batches")


CHILD = """#!/bin/sh
echo 'a warning'
case "$4" in
    rates) echo '{"part": "rates", "what": "memory", "value": 2.5, "unit": "TB/s"}'; sleep 60 ;;
    cold) exit 3 ;;
    decode)
        echo '{"part": "decode", "what": "MBU, captured", "value": 0.4, "unit": ""}'
        echo '{"part": "decode", "fallbacks": ["the step was not captured"]}' ;;
    *) echo '{"part": "'$4'", "fallbacks": []}'; sleep 60 ;;
esac
"""


@pytest.mark.parametrize(("names", "status"), [(["rates", "cold", "waits"], 0), (["decode", "waits"], 1)])
def test_parts_run_in_processes_that_may_hang_or_die(names, status, argv, capsys, monkeypatch, tmp_path):
    """The table says of each figure whether it was measured, with a fallback, or only estimated."""
    child = tmp_path / "child"
    child.write_text(CHILD)
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert gpu_report.main([*names, *argv, "--limit", "2"]) == status
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert "machine" in lines[0]
    assert re.search(r"^matrix product +798 TFLOP/s +estimated$", out, re.M)
    if status:
        assert re.search(r"^MBU, captured +0.72 to 0.78 +0.4 +fallback$", out, re.M)
        assert re.search(r"^decode +fallback: the step was not captured$", out, re.M)
    else:
        assert re.search(r"^memory +3.0 TB/s +2.5 TB/s +measured$", out, re.M)
        assert {"part": "rates", "failed": "it took more than 2 seconds"} in lines
        assert {"part": "cold", "failed": "its process ended with status 3"} in lines
        assert lines[-1] == {"part": "waits", "fallbacks": []}
