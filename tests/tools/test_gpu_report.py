"""`python -m tools.gpu_report` on the CPU, with a tiny model: its parts, its processes, and its table."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.compiler import requires_new_torch
from support.tiny import write_checkpoint

import pop
from pop.backends import cuda_graph
from pop.pruning import cost
from tools.bench.roofline import Machine, speedup_limit
from tools.bench.shapes import decode_bytes
from tools.bench.subject import _read_shape
from tools.common import ROOT
from tools.gpu_report import __main__ as gpu_report
from tools.gpu_report import estimates, parts, registers

ON_GPUS = {"waits", "kernels", "tests", "memory", "fa3", "fp8", "pdl", "products", "moe", "small"}


@pytest.fixture
def argv(tmp_path, monkeypatch, given_rates):
    """The options of a run on the CPU."""
    monkeypatch.setattr(parts, "COLD", (5, 11))
    monkeypatch.setattr(parts, "POSITION", 20)
    monkeypatch.setattr(parts, "BATCHES", (3,))
    monkeypatch.setattr(parts, "LONG", 32)
    monkeypatch.setattr(parts, "KEYS", (512,))
    monkeypatch.setattr(parts, "L2", 1)
    folder = write_checkpoint(tmp_path / "tiny", num_layers=8, max_positions=4096)
    return ["--shape", str(folder), "--lengths", "8,16", "--device", "cpu", "--layers", "4"]


@pytest.fixture(scope="module")
def estimated():
    """To count them takes a second."""
    return estimates.estimates()


def measured(name, argv, capsys) -> list[dict]:
    """The lines of a part, in this process."""
    assert gpu_report.main(["--child", name, *argv]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", [name for name in parts.PARTS if name not in ON_GPUS])
def test_a_part_measures_what_was_estimated(name, argv, estimated, capsys, monkeypatch):
    """Those that need no GPU, and attention with a stand-in for the kernel that does."""
    monkeypatch.setattr(parts.cuda, "fused_attention", lambda q, *_: torch.zeros(q.shape))
    *figures, last = measured(name, argv, capsys)
    assert last == {"part": name, "fallbacks": []}
    assert figures and all(line["part"] == name and line.keys() >= {"what", "value", "unit"} for line in figures)
    names = {re.sub(r"\d[\d,]*", "N", line["what"]) for line in figures}
    expected = {re.sub(r"\d[\d,]*", "N", what) for what in estimated}
    assert names & expected or name in ("paths", "batches")


def test_the_limits_of_plans_are_those_of_the_readme():
    config, _ = _read_shape("llama3.1-8b")
    machine = Machine(estimates.FLOPS, estimates.BYTES)
    rows = (ROOT / "tools" / "gpu_report" / "README.md").read_text(encoding="utf-8").splitlines()
    plans = {"the deepest 10": pop.PrunePlan(range(22, 32))}
    for count in (10, 11, 12, 16):
        plans[f"{count}, calibrated"] = estimates.calibrated_plans(config, count)["calibrated, with selection"]
    for name, plan in plans.items():
        (row,) = (row for row in rows if row.startswith(f"| {name}"))
        limits = [speedup_limit(config, length, plan, machine) for length in (512, 2048, 8192)]
        assert re.findall(r"(\d\.\d\d)x", row) == [f"{limit:.2f}" for limit in limits]


def test_the_gains_that_the_rollout_expects_follow_from_shapes():
    """Of 11 layers of Llama-3.1-8B. Selected tokens cost nothing, or each run of ten reads all keys."""
    config, _ = _read_shape("llama3.1-8b")
    plan = estimates.calibrated_plans(config, 11)["calibrated, with selection"]
    answer, rows = 200, 32  # new tokens of an answer, and answers at a time
    table = []
    for length in (2048, 8000):
        full = 1e3 * cost.prefill_flops(config, length, pop.PrunePlan.none()) / (0.69 * estimates.FLOPS)  # ms
        least = full / speedup_limit(config, length, plan, Machine(estimates.FLOPS, estimates.BYTES))
        runs = plan.num_selected(length - plan.full_depth_last - plan.full_depth_first) / 10
        in_layer = 2 * 2 * config.num_kv_heads * config.head_dim * length  # bytes of keys and values
        most = least + 1e3 * len(plan.layers) * runs * in_layer / estimates.BYTES
        one, two = (decode_bytes(config, position, torch.bfloat16) for position in (length, length + 100))
        read = two + (rows - 1) * (length + 100) * (two - one) / 100  # each row has keys and values of its own
        decode = answer * 1e3 * read / (0.75 * estimates.BYTES) / rows  # ms of an answer
        requests = [f"{(full + decode) / (taken + decode):.2f}x" for taken in (most, least)]
        waits = [f"{least:.0f}", f"{most:.0f}"]
        requests, waits = (" to ".join(dict.fromkeys(pair)) for pair in (requests, waits))  # equal ones once
        wait = f"{waits} ms, {full:.0f} without the plan"
        table.append([f"{full / least:.2f}x", f"{full / most:.2f}x", requests, "1.00x", wait])
    lines = (ROOT / "tools" / "vllm" / "ROLLOUT.md").read_text(encoding="utf-8").splitlines()
    (first,) = (
        number for number, line in enumerate(lines) if line.startswith("| first token, if selected tokens cost")
    )
    cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines[first : first + 5]]
    assert cells == [[*row] for row in zip(*table, strict=True)]


CHILD = """#!/bin/sh
echo 'a warning'
case "$4" in
    rates) echo '{"part": "rates", "what": "memory", "value": 2.5, "unit": "TB/s"}'; sleep 60 ;;
    cold) exit 3 ;;
    moe) exit 0 ;;
    decode)
        echo '{"part": "decode", "what": "MBU, captured", "value": 0.4, "unit": ""}'
        echo '{"part": "decode", "fallbacks": ["the step was not captured"]}' ;;
    *) echo '{"part": "'$4'", "fallbacks": []}'; sleep 60 ;;
esac
"""


@pytest.mark.parametrize(
    ("names", "status"), [(["rates", "cold", "moe", "waits"], 1), (["decode", "waits"], 1), (["kernels", "waits"], 0)]
)
def test_parts_run_in_processes_that_may_hang_or_die(names, status, argv, capsys, monkeypatch, tmp_path):
    """The table says of each figure whether it was measured, with a fallback, or only estimated.

    The status tells whether every part was measured as it should be.
    """
    child = tmp_path / "child"
    child.write_text(CHILD)
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    (tmp_path / "version").write_text("NVRM version: 570.1\nGCC version: 12\n")
    monkeypatch.setattr(gpu_report, "DRIVER", tmp_path / "version")
    assert gpu_report.main([*names, *argv, "--limit", "1"]) == status
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert {"machine", "commit", "cuda"} < lines[0].keys()
    assert lines[0]["driver"] == "NVRM version: 570.1"
    assert "prefill of 2,048" not in out  # which is estimated for another shape
    assert re.search(r"^matrix product +798 TFLOP/s +estimated$", out, re.M)
    if "decode" in names:
        assert re.search(r"^MBU, captured +0.72 to 0.78 +0.80 or more +0.4 +fallback$", out, re.M)
        assert re.search(r"^decode +fallback: the step was not captured$", out, re.M)
    if "rates" in names:
        assert re.search(r"^memory +3.0 TB/s +2.5 TB/s +measured$", out, re.M)
        assert {"part": "rates", "failed": "it took more than 1 seconds"} in lines
        assert {"part": "cold", "failed": "its process ended with status 3"} in lines
        assert {"part": "moe", "failed": "its process ended with status 0"} in lines
    assert lines[-1] == {"part": "waits", "fallbacks": []}


@pytest.mark.parametrize(
    ("status", "said"), [(1, "1 failed, 115 passed in 9s"), (0, "116 skipped in 1s"), (4, "usage"), (0, "116 passed")]
)
def test_tests_that_fail_or_are_skipped_are_a_part_that_failed(status, said, capsys, monkeypatch):
    done = SimpleNamespace(returncode=status, stdout=f"...\n{said}\n", stderr="a worker says goodbye\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    setup = SimpleNamespace(device=torch.device("cpu"))
    gpu_report.measure(setup, "tests")
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    if said == "116 passed":
        assert found["value"] == said
    else:
        assert said in found["failed"]


def test_slow_paths_and_refused_captures_are_fallbacks(argv, monkeypatch):
    """On a setup that says it is on a GPU, although its model is on the CPU, where no path is the fastest."""
    setup = parts.Setup(gpu_report.parser().parse_args(argv))
    cuda_graph._refused[setup.model.module] = {"prefill", "decode of 8 rows"}
    setup.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    monkeypatch.setattr(parts, "find_spec", lambda name: name == "flash_attn_interface")
    found = {what: path for what, path, _ in parts.paths(setup)}
    marked = parts.fallbacks(setup)
    assert len(found) == 6
    assert [f"{what}: {path}" for what, path in found.items()] == [one.split(", not")[0] for one in setup.slow[-6:]]
    assert set(setup.slow) < set(marked)
    assert marked[-2:] == [f"{what} could not be captured" for what in ("decode of 8 rows", "prefill")]


def test_a_model_that_memory_shortens_is_a_fallback(argv, monkeypatch):
    """Its figures would stand beside estimates for all layers. With --layers, these estimates are left out."""
    monkeypatch.setattr("tools.bench.subject.free_bytes", lambda device: 1)
    monkeypatch.setattr("tools.bench.subject.fitting_layers", lambda *_: 3)
    monkeypatch.setattr(pop.Model, "warmup", lambda self, **_: None)
    for options, slow in ((argv[:-2], ["only 3 of 8 layers fit into the free memory"]), (argv, [])):
        setup = parts.Setup(gpu_report.parser().parse_args(options))
        assert setup.model.config.num_layers == (3 if slow else 4)
        assert [one for one in setup.slow if "compiled" not in one] == slow


@requires_new_torch  # kernels for float32 spill registers with the Triton of torch 2.8
@pytest.mark.parametrize("capability", [86, 90])
def test_no_kernel_spills_or_needs_more_shared_memory_than_a_gpu_has(capability):
    """99 KB is what sm_86 and sm_89 give a block of threads; others have more."""
    pytest.importorskip("triton")
    found = list(registers.needs((capability,)))
    assert len(found) == 18
    assert [need for need in found if need.spills or need.shared > 99 * 1024] == []
    assert not any(need.stack for need in found if need.kernel == "attention_of_part")
    assert all(16 < need.registers <= 255 for need in found)
    lines = registers.summary(found).splitlines()
    assert len(lines) == 19 and lines[0].endswith(f"sm_{capability}")


def test_without_triton_the_registers_cannot_be_counted(monkeypatch, capsys):
    monkeypatch.setattr(registers, "find_spec", lambda name: None)
    assert registers.main() == 2
    assert "pip install triton" in capsys.readouterr().err


def test_targets_are_those_of_figures(estimated):
    """A name that is spelt otherwise would never be printed beside its figure."""
    assert estimates.TARGETS.keys() < estimated.keys()
