"""A repository to download from a HubServer, and what the tests of downloads do with it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save
from support.hub_server import HubServer
from support.tiny_chat import write_chat_checkpoint

from pop.checkpoints.download import INDEX, MANIFEST, download
from pop.errors import DownloadError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, ONE, TWO)
TOKEN = "hf_SecretSecretSecret"


def repository(folder: Path) -> dict[str, bytes]:
    """The files of a repository: a checkpoint in two shards, and others that `pop` does not need."""
    folder = write_chat_checkpoint(folder, num_layers=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = load_file(folder / "model.safetensors")
    del files["model.safetensors"]
    names = sorted(weights)
    shards = {ONE: names[: len(names) // 2], TWO: names[len(names) // 2 :]}
    for shard, tensors in shards.items():
        files[shard] = save({name: weights[name] for name in tensors}, metadata={"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["generation_config.json"] = b'{"eos_token_id": [2]}'
    return files | {"README.md": b"# read me", "original/consolidated.00.pth": b"x", "extra.safetensors": b"x"}


def partial(folder: Path) -> Path:
    """Where the files of an unfinished download lie."""
    return folder.with_name(".tiny.partial")


def fetch() -> Path:
    return download("tiny", progress=False)


def refused(*said: str) -> str:
    """Expect a DownloadError of one line, with all of these words and without the token; return its message."""
    with pytest.raises(DownloadError) as caught:
        fetch()
    message = str(caught.value)
    assert all(words in message for words in said), message
    assert "\n" not in message and TOKEN not in repr(caught.value)
    return message


def assert_right(folder: Path, server: HubServer) -> None:
    """Check that the folder holds exactly the published files, and that its parent holds only the folder."""
    assert {path.name for path in folder.iterdir()} == {*NEEDED, MANIFEST}
    for name in NEEDED:
        assert (folder / name).read_bytes() == server.files[name], name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
