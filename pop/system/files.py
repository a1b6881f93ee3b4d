"""Files and folders that appear whole or not at all, and reading JSON.

A reader never finds half a file or half a checkpoint. An error or Ctrl-C removes the unfinished copy at once. After a
kill it stays. The next writer of a folder removes it, and that of a file does not. A second process that writes the
same folder waits.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pop.errors import CheckpointError, ConfigError, PopError

READ = (".json", ".safetensors", ".model", ".jinja", ".plan", ".pth")  # endings of the files that are read


@contextlib.contextmanager
def staged(folder: str | Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a hidden, empty sibling of `folder`, which gets the name of `folder` when the block succeeds.

    `keep` leaves the files of a failed block in place, for the next block with `keep`. Raises CheckpointError if
    something could not be written (every OSError), or if `folder` exists and is not an empty directory.
    """
    folder = Path(folder).resolve()
    if not folder.name or folder == Path.cwd():  # neither can be replaced
        raise CheckpointError(f"{folder} cannot be replaced by a new folder; choose another one")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _locked(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(f"{folder} exists already; remove it, or choose another folder")
            if partial.exists() and not keep:
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=True)
            try:
                yield partial
                for path in [*partial.iterdir(), partial]:
                    _sync(path)
                os.replace(partial, folder)  # fails unless `folder` is missing or an empty directory
            except BaseException:  # includes KeyboardInterrupt
                if not keep or not any(partial.iterdir()):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        _sync(folder.parent)
    except PopError:
        raise
    except (OSError, SafetensorError) as error:
        rest = f"{partial} is kept" if keep else "nothing is left behind"
        raise CheckpointError(f"{folder} could not be written, and {rest}: {error}") from error


@contextlib.contextmanager
def replaced(path: str | os.PathLike, what: str, error: type[PopError]) -> Iterator[Path]:
    """Yield a hidden sibling of the file `path` to write to. It replaces `path` only when the block succeeds.

    A file that is there keeps its mode, and until then only its owner can read the new one. Raises `error`, which names
    `what` was to be written and why it was not.
    """
    with _draft(path, what, error) as (path, draft):
        yield draft
        if path.exists():
            shutil.copymode(path, draft)
        _sync(draft)
        os.replace(draft, path)


@contextlib.contextmanager
def _draft(path: str | os.PathLike, what: str, error: type[PopError]) -> Iterator[tuple[Path, Path]]:
    """Yield the real path of a file, and a hidden sibling to write to, which is removed at the end."""
    try:
        file = Path(os.path.realpath(os.path.expanduser(path)))  # replaces the target of a link, not the link
        if file.exists() and not file.is_file():  # a device or a pipe: as root, a file would replace it for everyone
            raise OSError("it is not a regular file")
        draft = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            if file.exists():
                draft.touch(mode=0o600)
            yield file, draft
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
    except PopError:
        raise
    except (OSError, ValueError, TypeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{what} cannot be written to {path} ({reason}); choose another path") from None


def write_whole(path: str | os.PathLike, data: bytes, what: str, error: type[PopError]) -> None:
    """Write a file whole or not at all. The arguments are as in `replaced`."""
    with replaced(path, what, error) as draft:
        draft.write_bytes(data)


def check_writable(path: str | os.PathLike, what: str, error: type[PopError], size: int = 4096) -> None:
    """Raise the error that `write_whole` would raise for `size` bytes, before the work. Nothing is left behind."""
    with _draft(path, what, error) as (file, draft):
        draft.write_bytes(bytes(4096))  # a full disk takes empty files
        folder = file.parent
        free = shutil.disk_usage(folder).free
        if free < size:
            raise error(f"{what} takes about {size:,} bytes, but {folder} has {free:,} free; choose another path")


def hash_file(path: Path, hasher) -> str:
    """Feed a file to a hashlib object; return the hex digest."""
    with path.open("rb") as file:
        while block := file.read(2**20):
            hasher.update(block)
    return hasher.hexdigest()


def read_json(path: str | os.PathLike, error: type[PopError] = ConfigError) -> dict[str, Any]:
    """Return the JSON object in a file. Raise `error` if it holds something different, such as NaN or Infinity."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} is not readable JSON ({problem}); replace the file") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__} instead of an object; replace the file")
    return value


def refuse_pointers(folder: Path) -> None:
    """Raise CheckpointError if files that may be read are pointers of Git LFS, which a clone without it leaves."""
    for path in sorted(folder.glob("*")):
        is_small = path.suffix in READ and path.is_file() and os.access(path, os.R_OK) and path.stat().st_size < 1024
        if is_small and path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
            raise CheckpointError(
                f"{path} is a pointer of Git LFS instead of the file; run `git lfs pull` in its folder, or fetch the "
                "files anew"
            )


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors (on the CPU) and the metadata of a safetensors file. Raises OSError or SafetensorError.

    The file is mapped into memory: a page is read when it is first touched.
    """
    open(path, "rb").close()  # raises the error of a file that may not be read, which safetensors calls missing
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on the name of a folder, which need not exist. The system releases that of a killed process."""
    import fcntl  # exists on POSIX only, and only folders need it

    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    is_held = False
    while not is_held:
        with open(path, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another process that writes {folder} ...", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                is_held = os.path.samestat(os.fstat(lock.fileno()), path.stat())  # not if its last holder removed it
            if is_held:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
