"""tools/evaluate/sandbox.py: programs that work pass, and everything that a solution does not need is refused."""

import os
import time
from pathlib import Path

import pytest

from tools.evaluate import sandbox


def test_a_program_that_ends_passes_and_one_that_fails_says_why():
    assert sandbox.run("import math\nopen('mine.txt', 'w').write('x')\nassert math.sqrt(4) == 2") == (True, "")
    assert sandbox.run("assert 1 == 2, 'no'") == (False, "AssertionError: no")
    began = time.monotonic()
    assert sandbox.run("while True: pass", seconds=1) == (False, "stopped after 1 s")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os._exit(0)", ""),
        ("import sys; sys.exit()", ""),
        ("def f(:", ""),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("import os\nfor _ in range(20):\n  if os.fork() == 0: break", "PermissionError"),
        ("import os\nos.open(os.path.dirname(os.getcwd()), os.O_RDONLY)", "PermissionError"),
        ("import sqlite3\nsqlite3.connect('x')", "PermissionError"),
        ("import os\nos.system('true')", "PermissionError"),
        ("open('big', 'wb').write(bytes(8 << 20))", "File too large"),
        ("while True: print('x' * 1000)", "xxx"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import ctypes\nctypes.CDLL(None)", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "PermissionError"),
        ("import torch", "ModuleNotFoundError"),
        ("import os\nassert 'POP_SECRET' not in os.environ and not os.listdir('.')\nraise KeyError", "KeyError"),
    ],
)
def test_what_a_solution_does_not_need_is_refused(program, reason, monkeypatch):
    monkeypatch.setenv("POP_SECRET", "x")
    passed, message = sandbox.run(program, seconds=20)
    assert not passed and reason in message


def test_nothing_outside_of_the_folder_can_be_written_or_deleted(tmp_path):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept.txt"
    kept.write_text("precious")
    kept.chmod(0o666)
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"open({str(tmp_path / 'new.txt')!r}, 'x')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import os; os.symlink({str(kept)!r}, 'link'); open('link', 'w')",
        f"import os; os.chdir({str(tmp_path)!r}); open('new.txt', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        passed, message = sandbox.run(program)
        assert not passed and "PermissionError" in message, program
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"] and kept.read_text() == "precious"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at a process in /proc")
def test_children_die_with_the_program(tmp_path, monkeypatch):
    """A stand-in for the inside that refuses nothing."""
    (tmp_path / "inside.py").write_text(f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
child.wait()
""")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "inside.py"))
    began = time.monotonic()
    assert sandbox.run("pass", seconds=2) == (False, "stopped after 2 s")
    assert time.monotonic() - began < 30
    process = Path("/proc") / (tmp_path / "pid").read_text()
    for _ in range(100):
        if not process.exists() or not (process / "cmdline").read_bytes():  # gone, or a zombie that init has to reap
            return
        time.sleep(0.05)
    raise AssertionError(f"{process} is still there")
