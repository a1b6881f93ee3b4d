"""`python -m tools.gpu_report` on the CPU, with a tiny model: its parts, its table, and its errors."""

import json
import re

import pytest
import torch
from support.tiny import write_checkpoint

from tools import gpu_report
from tools.bench import measure


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """The options of a run on the CPU, with rates that are given instead of measured."""
    for module in (measure, gpu_report):
        monkeypatch.setattr(module, "peak_turn", lambda *_: lambda: {"flops_per_s": 1e9})
        monkeypatch.setattr(module, "bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e9})
    monkeypatch.setattr(gpu_report, "COLD", (5, 11))
    monkeypatch.setattr(gpu_report, "KEYS", (512,))
    monkeypatch.setattr(gpu_report, "L2", 1)
    folder = write_checkpoint(tmp_path / "tiny", num_layers=8, max_positions=4096)
    return ["--shape", str(folder), "--lengths", "8,16", "--device", "cpu", "--layers", "4"]


def figures(out: str) -> dict[str, dict]:
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return {line["what"]: line for line in lines if "what" in line}


def names(texts) -> set[str]:
    """With N in place of numbers."""
    return {re.sub(r"\d[\d,]*", "N", text) for text in texts}


def test_the_parts_measure_what_was_estimated(argv, capsys, monkeypatch):
    """Those that need no GPU, and attention with a stand-in for the kernel that does."""
    monkeypatch.setattr(gpu_report.cuda, "fused_attention", lambda q, k, v, scale: torch.zeros(q.shape))
    parts = ["rates", "cold", "decode", "prefill", "attention"]
    assert gpu_report.main([*parts, *argv]) == 0
    out = capsys.readouterr().out
    found = figures(out)
    assert {line["part"] for line in found.values()} == set(parts)
    on_gpus = {"waits for each token of generate", "kernels of sgemm or cuDNN", "pytest -m cuda"}
    of_products = {name for name in gpu_report.ESTIMATES if name.startswith("matrix ") and "token" in name}
    assert names(gpu_report.ESTIMATES) - names(found) == names(on_gpus | of_products)
    assert found["memory"]["value"] == 1e-3
    assert found["speedup at 16 tokens"]["value"] > 0
    assert found["attention of one token, 512 keys: pop, error"]["value"] < 1e-2
    assert found["attention of one token, 512 keys: flash, error"]["value"] == 1
    assert re.search(r"^memory +3\.0 TB/s +0\.001 TB/s$", out, re.M)


def test_a_part_that_fails_does_not_stop_the_others(argv, capsys, monkeypatch):
    def broken(setup):
        yield "one", 1, "s"
        raise ValueError("no kernel")

    monkeypatch.setitem(gpu_report.PARTS, "attention", broken)
    assert gpu_report.main(["attention", "rates", *argv]) == 0
    out = capsys.readouterr().out
    assert json.dumps({"part": "attention", "failed": "ValueError: no kernel"}) in out.splitlines()
    assert figures(out).keys() == {"one", "matrix product", "memory"}
    assert re.search(r"^attention +failed: ValueError$", out, re.M)
