"""A hub on this machine with the model `tiny`."""

import os
import threading

import pytest
from support.downloads import repository
from support.hub_server import REPOSITORY, HubServer

from pop.checkpoints import hub, registry


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of the repository."""
    return repository(tmp_path_factory.mktemp("published") / "chat")


@pytest.fixture
def start(published):
    """start(certificate=None) starts a server with the published files, which ends with the test."""
    servers = []

    def begin(certificate=None):
        servers.append(HubServer(dict(published), certificate))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


@pytest.fixture
def server(start, tmp_path, monkeypatch):
    """A hub with the model `tiny`. POP_WEIGHTS is tmp_path / "weights", and no thread outlives the test."""
    server = start()
    monkeypatch.setitem(registry.MODELS, "tiny", registry.Entry("tiny", "llama", 1, REPOSITORY))
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "HF_TOKEN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("POP_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    before = set(threading.enumerate())  # torch's compiler keeps its own pool
    yield server
    assert not [t.name for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]


@pytest.fixture
def folder(tmp_path):
    """Where the model `tiny` is downloaded to."""
    return tmp_path / "weights" / "tiny"
