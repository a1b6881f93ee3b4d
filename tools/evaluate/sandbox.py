"""Run a short Python program that nobody has read, such as a model's answer to a HumanEval problem.

    passed, message = run(program, seconds=5)

The program gets a fresh interpreter (`python -I -S`: no environment, no site-packages, nothing from the current
folder), an empty temporary folder, and limits on CPU time, memory, file sizes and processes that the kernel enforces.
Where the system allows it, it also gets a network namespace without a network and, if the caller is root, the rights
of `nobody`; a root whose interpreter nobody else can read stays root, whom the limit on processes does not bind.
Inside, an audit hook refuses what a solution never needs: to write outside of the folder, to delete or rename, to
start a process, to open a socket, to load a C library. After `seconds` of wall-clock time the whole process group is
killed.

This stops mistakes, and a program that does the obvious wrong thing. It does not hide what the caller may read, and a
determined attacker could get around the audit hook: give code from a model that you distrust a container or a machine
of its own.

This file is both sides: imported, it offers `run`; started as a script, it is the inside.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

DONE = b"done\n"  # what the inside reports once the program has come to its end; os._exit(0) does not get there
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes of any file, and of what the program prints
NOBODY = 65534
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000  # flags of unshare(2)

REFUSED = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "pty.", "subprocess."),
    *("os.kill", "signal.pthread_kill", "resource.", "ctypes.", "socket.", "syslog.", "mmap.", "sqlite3."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil."),
    *("os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr", "os.chdir"),
)


def run(program: str, *, seconds: float = 5.0) -> tuple[bool, str]:
    """Run `program` for at most `seconds`. Returns whether it ended without an exception, and if not, what it said."""
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
            timed_out = process.poll() in (None, -signal.SIGKILL, -signal.SIGXCPU)  # these from the limit on CPU time
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
    return False, said.splitlines()[-1][:200] if said else f"ended with status {process.returncode} before its end"


# ---- Inside ----


def confine(seconds: float) -> None:
    """Give up, for good, what the program shall not have."""
    import ctypes

    unshare = ctypes.CDLL(None).unshare
    if os.geteuid() == 0:
        unshare(NEW_NETWORK)
        _become_nobody()
    else:
        unshare(NEW_USER | NEW_NETWORK)  # may be forbidden: then the audit hook alone stands before the network
    cpu = max(1, round(seconds))
    limits = {"CPU": cpu, "AS": MEMORY, "FSIZE": OUTPUT, "NPROC": 1, "NOFILE": 32, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.addaudithook(_refuse)


def _become_nobody() -> None:
    """Root is exempt from the limit on processes. Stay root only where nobody else can read this interpreter."""
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
        if os.path.isdir(path):  # the hook does not see it where a path is relative to an open folder
            raise PermissionError(f"the folder {path} cannot be opened here")
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            where = os.path.realpath(os.fsdecode(path))
            if os.path.commonpath((where, _folder)) != _folder:
                raise PermissionError(f"{where} cannot be written here")


def main() -> None:
    seconds, report = float(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:]  # a program shall not read there which file says that it is done
    program = compile(sys.stdin.buffer.read(), "program.py", "exec")
    confine(seconds)
    exec(program, {"__name__": "__main__"})
    os.write(report, DONE)


if __name__ == "__main__":
    main()
