"""Names, suggestions, and the places where weights are looked for."""

from pathlib import Path

import pytest

from pop.checkpoints import registry
from pop.checkpoints.embedded import EMBEDDED
from pop.checkpoints.registry import find_weights, list_models, lookup, weights_folder
from pop.errors import PopError, UnknownModel, WeightsNotFound


@pytest.fixture
def places(tmp_path, monkeypatch):
    """$POP_WEIGHTS, the weights/ of the checkout that pop runs from, and the user's cache; all are empty."""
    checkout = tmp_path / "checkout"
    (checkout / "pop").mkdir(parents=True)
    (checkout / "weights").mkdir()
    (checkout / "setup.py").touch()
    monkeypatch.setattr(registry, "__file__", str(checkout / "pop" / "checkpoints" / "registry.py"))
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return [tmp_path / "mine", checkout / "weights", tmp_path / "cache" / "pop"]


def put(folder: Path, file: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("{}")
    return folder


def test_names():
    llamas = ["llama3.1-8b", "llama3.1-70b", "llama3.1-405b", "llama3.2-1b", "llama3.2-3b"]
    gemmas = ["gemma3-270m", "gemma3-1b", "gemma3-4b", "gemma3-12b", "gemma3-27b"]
    qwens = [f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b", "30b-a3b", "235b-a22b")]
    seeing = ("2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b")
    qwens += [f"qwen3-vl-{size}{kind}" for size in seeing for kind in ("", "-thinking")]
    instruct = {*(f"{name}-instruct" for name in llamas), *(f"{name}-it" for name in gemmas)}
    assert set(list_models()) == {*llamas, *gemmas, *qwens, *instruct, "smollm2-135m"}
    for name in list_models():
        assert lookup(name).name == name
    entry = lookup("llama3.1-8b-instruct")
    assert (entry.family, entry.source) == ("llama", "meta-llama/Llama-3.1-8B-Instruct")
    sources = {name: lookup(name).source for name in list_models() if lookup(name).family == "gemma3"}
    assert sources["gemma3-270m"] == "google/gemma-3-270m"
    assert sources["gemma3-270m-it"] == "google/gemma-3-270m-it"
    assert (sources["gemma3-12b"], sources["gemma3-12b-it"]) == ("google/gemma-3-12b-pt", "google/gemma-3-12b-it")
    assert len(sources) == 10
    sources = [lookup(name).source for name in list_models() if lookup(name).family == "qwen3"]
    assert sources == [
        f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")
    ]
    assert lookup("qwen3-vl-8b").source == "Qwen/Qwen3-VL-8B-Instruct"
    assert lookup("qwen3-vl-235b-a22b-thinking").source == "Qwen/Qwen3-VL-235B-A22B-Thinking"
    assert lookup("qwen3-vl-8b-thinking").source == "Qwen/Qwen3-VL-8B-Thinking"
    assert {name for name in list_models() if lookup(name).embedded} == set(EMBEDDED) == {"smollm2-135m", "gemma3-270m"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama-3.1-8b", "llama3.1-8b"),
        ("Llama3.1-8B-Instruct", "llama3.1-8b-instruct"),
        ("LLAMA3.1-70B", "llama3.1-70b"),
        ("llama3.2-3", "llama3.2-3b"),
        ("smollm-135m", "smollm2-135m"),
        ("gemma-3-12b-it", "gemma3-12b-it"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_closest_first(typed, meant):
    with pytest.raises(UnknownModel) as caught:
        lookup(typed)
    message = str(caught.value)
    assert f"did you mean {meant}?" in message
    known = message.split("known are ")[1].split(", ")
    assert known[0] == meant and sorted(known) == sorted(list_models())


def test_a_name_like_none_gets_no_guess():
    for name in ("", "qqqq", "\x00", "/no/such/folder"):
        with pytest.raises(UnknownModel) as caught:
            lookup(name)
        assert "did you mean" not in str(caught.value) and "smollm2-135m" in str(caught.value)


def test_places_are_searched_in_order(places):
    mine, checkout, cache = (place / "llama3.2-1b" for place in places)
    (mine / "empty").mkdir(parents=True)  # a folder without a config is not a checkpoint
    put(cache)
    assert find_weights("llama3.2-1b") == cache
    put(checkout, "params.json")
    assert find_weights("llama3.2-1b") == checkout
    put(mine)
    assert find_weights("llama3.2-1b") == mine


def test_weights_that_are_nowhere(places):
    with pytest.raises(WeightsNotFound) as caught:
        find_weights("llama3.1-70b")
    message = str(caught.value)
    for place in places:
        assert str(place / "llama3.1-70b") in message
    assert f"meta-llama/Llama-3.1-70B into {places[0] / 'llama3.1-70b'}" in message
    for name in ("smollm2-135m", "gemma3-270m"):
        with pytest.raises(WeightsNotFound, match=f"pop demo --model {name}"):
            find_weights(name)
    with pytest.raises(UnknownModel):
        find_weights("llama9")
    assert issubclass(WeightsNotFound, PopError) and issubclass(WeightsNotFound, FileNotFoundError)


def test_a_package_outside_a_checkout_has_no_weights_beside_it(places, monkeypatch):
    monkeypatch.delenv("POP_WEIGHTS")
    put(places[1] / "llama3.2-1b")
    (places[1].parent / "setup.py").unlink()
    with pytest.raises(WeightsNotFound) as caught:
        find_weights("llama3.2-1b")
    assert str(places[1]) not in str(caught.value)
    assert weights_folder() == places[2]


def test_new_weights_go_to_the_first_place_that_can_take_them(places, monkeypatch):
    assert weights_folder() == places[0]
    monkeypatch.setenv("POP_WEIGHTS", "")
    assert weights_folder() == places[1]
    monkeypatch.setattr(registry.os, "access", lambda path, mode: Path(path) != places[1])
    assert weights_folder() == places[2]


def test_home_is_expanded(places, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POP_WEIGHTS", "~/models")
    assert weights_folder() == tmp_path / "models"
    monkeypatch.delenv("POP_WEIGHTS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    (places[1].parent / "setup.py").unlink()
    assert weights_folder() == tmp_path / ".cache" / "pop"
