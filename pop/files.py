"""Folders and files that appear whole or not at all.

Three things happen half-way through a download or an import; none may leave what looks like a checkpoint:
an error or Ctrl-C (cleaned up at once), a killed process (cleaned up by the next), a second process (waits).
"""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from pop.errors import CheckpointError, PopError


@contextlib.contextmanager
def staged(folder: str | Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a hidden, empty sibling of `folder`: renamed to `folder` when the block succeeds, else removed.

    keep: what the block has written stays when it fails, and the next one finds it, to go on from there.

    A file lock inside makes a second process wait. The system drops the lock of a killed process, so whoever
    holds it may clear away what lies there. Raises CheckpointError where `folder` holds something already,
    and for every OSError, that of a full disk among them.
    """
    folder = Path(folder).resolve()
    if not folder.name or folder == Path.cwd():  # neither can be replaced
        raise CheckpointError(f"{folder} cannot be the folder to make: choose another one, that need not exist.")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        lock = _lock(partial)
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(f"{folder} exists already: remove it, or choose another folder.")
            for left in _left(partial) if not keep else []:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            for path in [*partial.iterdir(), partial]:
                _sync(path)
            os.replace(partial, folder)  # over an empty directory at most: anything else is an OSError
        except BaseException:  # KeyboardInterrupt too
            if not (keep and _left(partial)):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.close()
        (folder / ".lock").unlink(missing_ok=True)  # not before: a second process would step in
        _sync(folder.parent)
    except PopError:
        raise
    except (OSError, SafetensorError) as error:
        left = f"{partial} is kept" if keep else "nothing is left behind"
        raise CheckpointError(f"{folder} could not be written, and {left}: {error}.") from error


@contextlib.contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a hidden sibling of `path` to write to: it replaces `path` when the block succeeds, else it is removed."""
    path = Path(os.path.realpath(path))  # a link is followed, not replaced
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield draft
        _sync(draft)
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _lock(partial: Path) -> IO:
    """Make `partial` and hold the lock in it: an open file, so that no failure anywhere leaves it held in this process.

    Waits for another process that holds it.
    """
    import fcntl  # here, since it is POSIX only: files need no lock

    path = partial / ".lock"
    partial.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # the other process may just remove or rename `partial`
            lock = open(path, "ab")  # noqa: SIM115 (it stays open)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another process that writes {partial} ...", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
            lock.close()


def _left(partial: Path) -> list[Path]:
    return [path for path in partial.iterdir() if path.name != ".lock"]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
