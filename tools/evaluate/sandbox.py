"""Run a short Python program that nobody has read, such as a model's answer to a HumanEval problem.

    passed, message = run(program, seconds=5)

The program gets a fresh interpreter without environment and site-packages (`python -I -S`), an empty temporary folder,
and kernel limits on CPU time, memory, file sizes and processes. Where the system allows it, the program also gets no
network and, if the caller is root, the rights of `nobody`. An audit hook refuses what a solution never needs, such as
writing elsewhere, deleting, or starting a process. After `seconds`, the whole process group is killed.

This stops mistakes and obvious misuse. It does not hide what the caller may read, and a determined attacker can get
around the audit hook. Run code from a model that you distrust in a container or on a separate machine.

This file is both sides: imported, it offers `run`; started as a script, it runs the program.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

DONE = b"done\n"  # reported after the program's last line: a program that leaves early does not report it
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes of any file, and of what the program prints
NOBODY = 65534
NEW_USER = 0x10000000  # flags of unshare(2)
NEW_NETWORK = 0x40000000

REFUSED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "pty.", "subprocess."),
    *("os.kill", "signal.pthread_kill", "resource.", "ctypes.", "socket.", "syslog.", "mmap.", "sqlite3."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil."),
    *("os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr", "os.chdir"),
)


def run(program: str, *, seconds: float = 5.0) -> tuple[bool, str]:
    """Run `program` for at most `seconds`. Returns whether it reached its end, and if not, its last line of output."""
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        os.chmod(folder, 0o777)  # for nobody
        command = [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__), str(seconds), str(writer)]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
            # None: it still runs. The signals are those of the CPU limit.
            timed_out = process.poll() in (None, -signal.SIGKILL, -signal.SIGXCPU)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(reader, False)
        with os.fdopen(reader, "rb") as report:
            passed = not timed_out and report.read() == DONE and process.returncode == 0
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - 1000))
        said = output.read().decode("utf-8", "replace").strip()
    if passed:
        return True, ""
    if timed_out:
        return False, f"stopped after {seconds:g} s"
    if said:
        return False, said.splitlines()[-1][:200]
    return False, f"ended with status {process.returncode} before its end"


# ---- Inside ----


def confine(seconds: float) -> None:
    """Give up for good what the program must not have."""
    import ctypes

    unshare = ctypes.CDLL(None).unshare
    if os.geteuid() == 0:
        unshare(NEW_NETWORK)
        _become_nobody()
    else:
        unshare(NEW_USER | NEW_NETWORK)  # may be forbidden: then only the audit hook blocks the network
    cpu = max(1, round(seconds))
    limits = {"CPU": cpu, "AS": MEMORY, "FSIZE": OUTPUT, "NPROC": 1, "NOFILE": 32, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.addaudithook(_refuse)


def _become_nobody() -> None:
    """Drop root, which is exempt from the limit on processes, unless no other user can read this interpreter."""
    os.seteuid(NOBODY)
    readable = os.path.exists(os.__file__)
    os.seteuid(0)
    if readable:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _refuse(event: str, arguments: tuple, _folder: str = os.getcwd()) -> None:
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return
        if os.path.isdir(path):  # paths relative to an open folder would pass the check below
            raise PermissionError(f"the folder {path} cannot be opened here")
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            where = os.path.realpath(os.fsdecode(path))
            if os.path.commonpath((where, _folder)) != _folder:
                raise PermissionError(f"{where} cannot be written here")


def main() -> None:
    seconds = float(sys.argv[1])
    report = int(sys.argv[2])
    del sys.argv[1:]  # the program must not find the file that reports success
    program = compile(sys.stdin.buffer.read(), "program.py", "exec")
    confine(seconds)
    exec(program, {"__name__": "__main__"})
    os.write(report, DONE)


if __name__ == "__main__":
    main()
