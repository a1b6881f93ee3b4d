"""The README is true: its links exist, its Python runs as printed, its commands do what it says."""

import ast
import inspect
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from hypothesis import settings
from support.readme import README, ROOT, TEXT, blocks
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.cli import demo
from pop.cli.commands import main


@pytest.fixture
def uncompiled(monkeypatch):
    """Each would compile a model of its own, which takes most of the time; CI's demo runs compiled."""
    monkeypatch.setattr("pop.model.SMALLEST", math.inf)


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_ci_runs_the_two_commands_as_printed():
    first, second = (line for block in blocks("bash") for line in block.splitlines() if line.startswith("pip "))
    assert (first, second) == ("pip install -e '.[demo]' && pop demo", "pip install -e '.[test]' && pytest")
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert second in script
    assert "pip install --quiet -e '.[demo]' && pop demo" in script


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_runs_as_printed(index, smollm2, uncompiled, capsys):
    exec(compile(blocks("python")[index], f"README.md, block {index + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_commands_run_as_printed(smollm2, uncompiled, capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pop ")]
    assert len(lines) >= 3
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
        assert capsys.readouterr().out.strip(), line


def test_the_demo_prints_what_the_readme_shows(smollm2, uncompiled, monkeypatch, capsys):
    """All but the times: these are of a machine that the README names.

    The answers of calibrated plans are left out too: they turn on the last digits of a fit, which differ by machine.
    """
    monkeypatch.setattr(demo, "_time", lambda *_: (1.0, [1.0]))
    assert main(["demo", "--runs", "1", "--max-new-tokens", "48", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    (shown,) = blocks("text")
    numbers, answers = shown.split("answers\n")
    assert f"prompt   {result['prompt_tokens']:,} tokens: " in numbers
    assert len(rows) == 5
    assert (rows[0]["answer"], rows[0]["finish_reason"]) == ('Chapter I is "Down the Rabbit-Hole"', "stop")
    for row in rows:
        label = demo.describe(row) + "  "
        (line,) = (line for line in numbers.splitlines() if line.startswith(label))
        *_, speedup, limit, kl = line.split()
        assert speedup.endswith("x")
        assert limit == f"{row['speedup_limit']:.2f}x"
        assert float(kl) == pytest.approx(row["kl_nats"], rel=0.05 if row["taps"] else 0, abs=0.001)
        (line,) = (line for line in answers.splitlines() if line.startswith(label))
        assert row["taps"] or line.removeprefix(label).strip() == row["answer"]


def test_the_python_in_the_text_fits_what_it_names(tmp_path):
    """Names and arguments, that is: what they do is tested by other files."""
    model = pop.load(write_chat_checkpoint(tmp_path / "chat"))
    known = {"pop": pop, "model": model, "chat": model.start_chat()}
    snippets = re.findall(rf"`((?:{'|'.join(known)})\.[^`]+)`", TEXT)
    assert len(snippets) > 20
    for snippet in snippets:
        code = ast.parse(snippet, mode="eval").body
        called = isinstance(code, ast.Call)
        found = eval(ast.unparse(code.func if called else code), known)
        if called:
            given = [arg for arg in code.args if ast.unparse(arg) != "..."]
            inspect.signature(found).bind_partial(*given, **{word.arg: None for word in code.keywords})


def test_the_extras_in_the_text_are_ones():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = re.findall(r"`pip install .*?\[(\w+)\]'`", TEXT)
    assert extras and all(f'"{extra}": ' in setup for extra in extras)


def test_the_lines_that_run_tests_run_many_examples_and_one_process(tmp_path, monkeypatch):
    many, one = re.findall(r"`((?:\w+=\w+ )?pytest\b[^`]*)`", TEXT)
    usual = os.environ.get("HYPOTHESIS_PROFILE", "ci")
    monkeypatch.setenv(*many.removesuffix(" pytest").split("="))
    try:
        runpy.run_path(str(ROOT / "tests" / "conftest.py"))
        assert settings.default.max_examples == 400
    finally:
        settings.load_profile(usual)
    file = tmp_path / "test_one.py"
    file.write_text("import os\n\ndef test_one():\n    assert 'PYTEST_XDIST_WORKER' not in os.environ\n")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    command = [sys.executable, "-m", *one.replace("FILE", str(file)).split(), "-c", str(ROOT / ".pytest.ini")]
    ran = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True)
    assert "1 passed" in ran.stdout, ran
