"""Names, suggestions, and the places where weights are looked for."""

from pathlib import Path

import pytest
from support.tiny import write_checkpoint

import pop
from pop.checkpoints import registry
from pop.checkpoints.download import download
from pop.checkpoints.registry import find_folder, find_weights, list_models, lookup, weights_folder
from pop.errors import CheckpointError, UnknownModel, WeightsNotFound


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
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return [tmp_path / "mine", checkout / "weights", tmp_path / "cache" / "pop"]


def put(folder: Path, file: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("{}")
    return folder


def test_the_table_is_consistent():
    """Names differ, and so do sources. What is not on the hub has a command that fetches it."""
    entries = list(registry.MODELS.values())
    assert len({entry.source for entry in entries}) == len(entries) == len(registry.TABLE.strip().splitlines())
    packages = {entry.name for entry in entries if "/" not in entry.source}
    assert packages <= registry.COMMANDS.keys() == {"smollm2-135m", "gemma3-270m"}
    for entry in entries:
        assert lookup(entry.name) == entry
        assert entry.name in packages or lookup(entry.source) == entry
    assert lookup("gemma3-12b").source == "google/gemma-3-12b-pt"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("llama-3.1-8b", "llama3.1-8b"),
        ("Llama3.1-8B-Instruct", "llama3.1-8b-instruct"),
        ("llama3.2-3", "llama3.2-3b"),
        ("smollm-135m", "smollm2-135m"),
        ("gemma-3-12b-it", "gemma3-12b-it"),
        *(("", None), ("qqqq", None), ("\x00", None), ("/no/such/folder", None)),
    ],
)
def test_an_unknown_name_gets_the_five_nearest(typed, meant):
    with pytest.raises(UnknownModel) as caught:
        lookup(typed)
    near, _, rest = str(caught.value).partition("near names are ")[2].partition("; ")
    near = near.split(", ")
    assert len(near) == 5 and {*near} < {*list_models()}
    assert meant in (None, near[0])
    assert rest == "`pop models` lists all"


def test_places_are_searched_in_order(places):
    mine, checkout, cache = (place / "llama3.2-1b" for place in places)
    (mine / "empty").mkdir(parents=True)  # a folder without a config is not a checkpoint
    put(cache)
    assert find_weights("llama3.2-1b") == cache
    put(checkout)
    assert find_weights("llama3.2-1b") == checkout
    put(mine)
    assert find_weights("llama3.2-1b") == mine


@pytest.mark.parametrize("name", ["llama3.1-70b", "a/b", *registry.COMMANDS])
def test_weights_that_are_nowhere(places, name):
    """The error names the places, and the command that fetches them."""
    with pytest.raises(WeightsNotFound) as caught:
        find_folder(name)
    message = str(caught.value)
    assert message.startswith(f"there is no folder {name}, and ") == (name == "a/b")
    for place in places:
        assert str(place / name) in message
    assert f"`{registry.COMMANDS.get(name, f'pop download {name}')}`" in message
    if name not in registry.COMMANDS:
        assert f"{lookup(name).source} into {places[0] / name}" in message


def test_new_weights_go_to_the_first_place(places, monkeypatch, tmp_path):
    assert weights_folder() == places[0]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POP_WEIGHTS", "~/models")
    assert weights_folder() == tmp_path / "models"
    monkeypatch.setenv("POP_WEIGHTS", "")
    assert weights_folder() == places[1]
    (places[1].parent / "setup.py").unlink()
    assert weights_folder() == places[2]
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights_folder() == tmp_path / ".cache" / "pop"


# ---- Repositories and paths


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b-instruct"),
        ("somebody/Llama-3.1-8B", "somebody/Llama-3.1-8B"),
    ],
)
def test_a_repository_is_a_known_model_or_has_its_own_name(places, repository, name):
    assert lookup(repository).name == name
    put(places[1] / name)
    assert find_folder(repository) == find_weights(repository) == places[1] / name


@pytest.mark.parametrize("path", ["./a/b", "~/nowhere", "/no/such/folder", "a/b/c", "../x"])
def test_a_path_that_does_not_exist_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsNotFound, match=f"there is no directory {Path(path).expanduser()}"):
        find_folder(path)


def test_beside_a_whole_model_only_an_adapter_is_refused(tmp_path):
    """tests/checkpoints/test_weights.py has what is there instead of a whole model."""
    write_checkpoint(tmp_path)
    for file in ("model.gguf", "params.json"):
        put(tmp_path, file)
    assert pop.load(tmp_path).config.num_layers == 5
    put(tmp_path, "adapter_config.json")
    with pytest.raises(CheckpointError, match="python -m tools.convert BASE DIR --adapter"):
        pop.load(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, not a folder.*tools.convert"):
        pop.load(tmp_path / "model.gguf")


# ---- The cache of Hugging Face's library

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(cache: Path, repository: str) -> Path:
    """As huggingface_hub keeps a repository: blobs, links to them in a snapshot, and the commit of main."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors"):
        put(folder / "blobs", f"blob of {name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"blob of {name}")
    return snapshot


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"])
def test_the_hugging_face_cache_is_read_last(places, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    hub = {"XDG_CACHE_HOME": "there/huggingface/hub", "HF_HOME": "there/hub", "HF_HUB_CACHE": "there"}[variable]
    one, two = (put_in_cache(tmp_path / hub, name) for name in ("google/gemma-3-4b-it", "a/b"))
    assert find_weights("gemma3-4b-it") == find_folder("google/gemma-3-4b-it") == one
    assert find_folder("a/b") == two == download("a/b")  # fetches nothing
    assert find_folder("a/b") != put(places[0] / "a/b") == find_folder("a/b")


@pytest.mark.parametrize("missing", ["../../refs/main", "config.json", "model.safetensors"])
def test_what_is_incomplete_in_the_cache_is_not_there(places, tmp_path, missing):
    snapshot = put_in_cache(tmp_path / "cache/huggingface/hub", "a/b")
    (snapshot / missing).unlink()
    with pytest.raises(WeightsNotFound):
        find_folder("a/b")
    for commit in ("../..", "main", "", "\udcff", f"{COMMIT}/../{COMMIT}"):  # none is a path
        (snapshot.parents[1] / "refs/main").write_bytes(commit.encode(errors="surrogateescape"))
        with pytest.raises(WeightsNotFound):
            find_folder("a/b")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret", "../../blobs/../../secret", "../../blobs/link"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_link_in_the_cache_leads_to_a_blob_of_its_repository(places, tmp_path, name, target):
    snapshot = put_in_cache(tmp_path / "cache/huggingface/hub", "a/b")
    put(snapshot.parents[2], "secret")
    (snapshot.parents[1] / "blobs/link").symlink_to(snapshot.parents[2] / "secret")
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} leads out of"):
        find_folder("a/b")


@pytest.mark.parametrize("part", ["blobs", "snapshots"])
def test_the_cache_of_a_repository_is_its_own(places, tmp_path, part):
    snapshot = put_in_cache(tmp_path / "cache/huggingface/hub", "a/b")
    folder = (snapshot.parents[1] / part).rename(tmp_path / part)
    (snapshot.parents[1] / part).symlink_to(folder)
    with pytest.raises((CheckpointError, WeightsNotFound)):
        find_folder("a/b")
