"""Tensor parallelism: two processes, each with one of two key-value heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

from engines import Reference, calibrated, prompts_of, write_checkpoint
from two_ranks import LENGTHS


def test_two_ranks_equal_the_reference(tmp_path):
    """Each rank has its rows of the corrections, and selection takes the largest attention over the ranks."""
    write_checkpoint(tmp_path / "checkpoint", "Qwen3ForCausalLM")
    engine = Reference(tmp_path / "checkpoint")
    plan = calibrated(engine, (1, 4, 5), full_depth_last=8, full_depth_selected=0.2, selecting_layer=3)
    plan.save(tmp_path / "test.plan")
    script = Path(__file__).with_name("two_ranks.py")
    environment = os.environ | {"POP_PLAN": str(tmp_path / "test.plan"), "PYTHONPATH": str(script.parent)}
    command = [sys.executable, script, engine.folder, "2048"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    answers = json.loads(line.removeprefix("ANSWERS"))
    for answer, prompt in zip(answers, prompts_of(LENGTHS), strict=True):
        expected = engine.expected(prompt, answer["ids"], plan)
        assert expected.argmax(-1).tolist() == answer["ids"]
        assert max(abs(value - float(expected[0, int(token)])) for token, value in answer["first"].items()) < 1e-4
