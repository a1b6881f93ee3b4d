"""`pop download`: which files are fetched, what survives an interruption, what is refused, and where the token goes."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import Request

import pytest
import torch
from support import hub_server
from support.disk import full_disk
from support.goldens import REFUSED
from support.hub_server import COMMIT, LISTING, REPOSITORY, HubServer, cut, other, redirect, stall, status
from support.tiny import shard
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.checkpoints import download as downloads
from pop.checkpoints import registry
from pop.checkpoints.download import download
from pop.cli import main
from pop.errors import CheckpointError, ConfigError, DownloadError

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, ONE, TWO)
TOKEN = "hf_SecretSecretSecret"
TRIES = len(downloads.PAUSES) + 1


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, bytes]:
    """The files of a repository: a checkpoint in two shards, and others that `pop` does not need."""
    folder = write_chat_checkpoint(tmp_path_factory.mktemp("published") / "chat", num_layers=2)
    shard(folder, 2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["generation_config.json"] = b'{"eos_token_id": [2]}'
    return files | {"README.md": b"# read me", "original/consolidated.00.pth": b"x", "extra.safetensors": b"x"}


@pytest.fixture
def start(published):
    """start(certificate=None) starts a server with the published files. It ends with the test."""
    servers = []

    def begin(certificate=None) -> HubServer:
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
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no login"))
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("POP_ENDPOINT", server.url)
    monkeypatch.setattr(downloads, "PAUSES", (0.001,) * (TRIES - 1))
    monkeypatch.setattr(downloads, "TIMEOUT", 1)
    before = set(threading.enumerate())  # torch's compiler keeps its own pool
    yield server
    assert not [t.name for t in set(threading.enumerate()) - before if "ThreadPool" in t.name]


@pytest.fixture
def secure(server, start, monkeypatch):
    """The hub over TLS, with a certificate of 127.0.0.1 that only these tests use. HF_TOKEN is set."""
    certificate = Path(__file__).parents[1] / "support" / "localhost.pem"
    secure = start(certificate)
    monkeypatch.setenv("POP_ENDPOINT", secure.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return secure


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the model `tiny` is downloaded to."""
    return tmp_path / "weights" / "tiny"


def partial(folder: Path) -> Path:
    """Where the files of an unfinished download are."""
    return folder.with_name(".tiny.partial")


def fetch() -> Path:
    return download("tiny", progress=False)


def refused(*said: str, error=DownloadError) -> str:
    """Expect an error of one line, with all of these words and without the token; return its message."""
    with pytest.raises(error) as caught:
        fetch()
    message = str(caught.value)
    assert all(words in message for words in said), message
    assert "\n" not in message and TOKEN not in repr(caught.value)
    return message


def assert_right(folder: Path, server: HubServer) -> None:
    """Check that the folder holds exactly the published files, and that its parent holds only the folder."""
    assert {path.name for path in folder.iterdir()} == set(NEEDED)
    for name in NEEDED:
        assert (folder / name).read_bytes() == server.files[name], name
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def fetch_right(folder: Path, server: HubServer) -> None:
    fetch()
    assert_right(folder, server)


# ---- Downloads that succeed


def test_download_fetches_the_needed_files_and_they_load(server, folder):
    assert fetch() == folder
    assert_right(folder, server)
    listing, config, *files = [path for path, _ in server.requests]
    assert listing == LISTING
    assert config == f"/{REPOSITORY}/resolve/{COMMIT}/config.json"  # looked at before anything else is fetched
    assert sorted(files) == sorted(f"/{REPOSITORY}/resolve/{COMMIT}/{name}" for name in NEEDED)
    server.requests.clear()
    assert fetch() == folder
    assert server.requests == []  # nothing is left to fetch
    model = pop.load("tiny")
    assert model.config.eos_ids == (2,)
    assert torch.isfinite(model.logits(torch.tensor([[5, 6, 7]]))).all()


def test_command_line(server, folder, capsys):
    assert main(["download", "tiny"]) == 0
    captured = capsys.readouterr()
    assert str(folder) in captured.out and "pop generate tiny" in captured.out
    assert "B/s" in captured.err  # tqdm's bar
    assert main(["download", "tiny9"]) == 2
    assert "near names are tiny," in capsys.readouterr().err
    assert main(["download", "smollm2-135m"]) == 2
    assert "python -m tools.demo" in capsys.readouterr().err


def test_a_folder_from_elsewhere_is_left_unchanged(server, folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    (folder / "model.safetensors").write_text("mine")
    assert fetch() == folder
    (folder / "model.safetensors").unlink()
    refused("holds neither model.safetensors", error=CheckpointError)  # it may hold plans, so it is not fetched anew
    (folder / "config.json").rename(folder / "notes.txt")
    refused("exists already", error=CheckpointError)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    shutil.rmtree(folder.parent)
    folder.parent.write_text("x")
    refused("could not be written", error=CheckpointError)


def test_a_repository_is_downloaded_and_loaded_by_its_own_name(server, tmp_path):
    del registry.MODELS["tiny"]
    server.files["preprocessor_config.json"] = b"{}"
    assert main(["download", REPOSITORY]) == 0
    folder = tmp_path / "weights" / REPOSITORY
    assert {path.name for path in folder.iterdir()} == {*NEEDED, "preprocessor_config.json"}
    assert pop.load(REPOSITORY).config.num_layers == 2


def test_shards_may_have_another_published_name(server, folder):
    for name in (ONE, TWO):
        server.files[name.replace("model-", "model.safetensors-")] = server.files.pop(name)
    server.files[INDEX] = server.files[INDEX].replace(b'"model-', b'"model.safetensors-')
    assert pop.load(fetch(), tokenizer=None).config.num_layers == 2


def test_a_download_without_a_file_of_its_index_is_not_finished(server, folder):
    server.files[INDEX] = server.files[INDEX].replace(TWO.encode(), b"weights-2.safetensors")
    refused(REPOSITORY, "weights-2.safetensors")
    assert not folder.exists()


def test_a_revision(server, folder):
    server.commit = "f" * 40
    assert main(["download", "tiny", "--revision", "refs/pr/1"]) == 0
    assert server.requests[0][0] == hub_server.OTHER_LISTING
    assert_right(folder, server)
    assert fetch() == folder
    with pytest.raises(DownloadError, match="'main'"):  # what is there may be another revision
        download("tiny", "main", progress=False)


def test_another_architecture_is_refused_before_its_weights(server, folder):
    server.files["config.json"] = b'{"model_type": "no_such_model"}'
    refused("model_type", "'no_such_model'", error=ConfigError)
    assert len(server.requests) == 2
    assert not folder.parent.exists()


# ---- Interruptions


@pytest.fixture
def interrupted(server, folder):
    """interrupted(how) calls it once half of ONE is written, and what follows does not come. Returns that size."""
    part = partial(folder) / ONE
    half = len(server.files[ONE]) // 2

    def begin(how):
        def fault(handler):
            cut(0.5)(handler)
            while not part.exists() or part.stat().st_size != half:
                time.sleep(0.01)
            how()
            handler.server.released.wait(60)

        server.faults[ONE] = [fault]
        return half

    return begin


def test_a_download_continues_after_a_kill(server, folder, interrupted):
    half = interrupted(lambda: process.kill())
    code = (
        "from pop.checkpoints import download, registry\n"
        f"registry.MODELS['tiny'] = registry.Entry('tiny', 'llama', 1, {REPOSITORY!r})\n"
        "download.download('tiny')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    assert process.wait(1200) == -signal.SIGKILL
    assert not folder.exists()
    fetch_right(folder, server)
    assert server.asked(ONE) == [None, f"bytes={half}-"]


def test_ctrl_c_ends_the_download_and_keeps_what_is_there(server, folder, interrupted, request):
    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    half = interrupted(lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert not folder.exists()
    fetch_right(folder, server)
    assert server.asked(ONE) == [None, f"bytes={half}-"]


@pytest.mark.parametrize("hub", ["server", "secure"])
@pytest.mark.parametrize(("fault", "timeout"), [(cut(0.5), 10), (cut(0.5, reset=True), 10), (stall(0.5), 0.5)])
def test_a_broken_connection_is_resumed(request, folder, monkeypatch, hub, fault, timeout):
    server = request.getfixturevalue(hub)
    monkeypatch.setattr(downloads, "TIMEOUT", timeout)
    server.faults[ONE] = [fault, fault]
    fetch_right(folder, server)
    size = len(server.files[ONE])
    half = size // 2
    assert server.asked(ONE) == [None, f"bytes={half}-", f"bytes={half + (size - half) // 2}-"]
    assert server.asked(TWO) == [None]


def test_a_range_follows_a_redirect_and_an_expired_address_is_renewed(server, folder, start):
    elsewhere = start()
    server.faults[ONE] = [hub_server.redirect_home(elsewhere)] * 3
    elsewhere.faults[ONE] = [cut(0.5), status(403)]
    fetch_right(folder, server)
    half = f"bytes={len(server.files[ONE]) // 2}-"
    assert elsewhere.asked(ONE) == [None, half, half]


@pytest.mark.parametrize(
    ("fault", "said"),
    [*((status(code), str(code)) for code in (408, 429, 500, 503)), (cut(0.1), "broke off")],
)
def test_a_passing_fault_is_tried_again_a_bounded_number_of_times(server, folder, fault, said):
    server.faults = {name: [fault, fault] for name in ("config.json", INDEX)} | {ONE: [fault] * 100}
    refused(ONE, said)
    assert len(server.asked(ONE)) == TRIES
    server.requests.clear()
    server.faults = {LISTING: [fault] * 2}  # it is asked for once, so that an error shows at once
    refused()
    assert len(server.requests) == 1
    server.faults.clear()
    fetch_right(folder, server)


# ---- Wrong answers


@pytest.mark.parametrize("answer", [hub_server.whole, lambda handler: handler.file(shift=3), status(416)])
def test_an_answer_that_does_not_continue_the_file(server, folder, answer):
    """It sends the whole file, another part of it, or none."""
    server.faults[ONE] = [cut(0.5), answer]
    fetch_right(folder, server)
    assert server.asked(ONE)[:2] == [None, f"bytes={len(server.files[ONE]) // 2}-"]


@pytest.mark.parametrize("name", ["config.json", INDEX, ONE])
def test_an_answer_that_is_not_the_file(server, folder, name):
    """A proxy's log-in page, a compressed file although identity was asked for, another file."""
    server.faults[name] = [hub_server.page, hub_server.compressed, other(bytes(50))]
    fetch_right(folder, server)


@pytest.mark.parametrize("name", ["config.json", ONE])
def test_a_file_with_another_hash_is_refused(server, folder, name):
    """Large files have a sha256, small ones git's hash."""
    listed = hub_server.entry(name, server.files[name])
    digest = listed["lfs"]["sha256"] if "lfs" in listed else listed["blobId"]
    server.faults[name] = [other(bytes(len(server.files[name])))] * TRIES
    refused(name, digest)
    assert server.asked(name) == [None] * TRIES  # nothing wrong is continued
    assert not folder.exists()
    fetch_right(folder, server)


def test_no_more_bytes_than_listed_are_written(server, folder, notes):
    longer = server.files[ONE] + bytes(10**6)
    server.faults[ONE] = [other(longer, length=-1)]
    written = notes(downloads._File, "matches", lambda file, path: path.stat().st_size)
    fetch_right(folder, server)
    assert max(written) == max(len(server.files[name]) for name in NEEDED)


def test_a_damaged_partial_file_is_fetched_anew(server, folder):
    """Bytes that are wrong, a file that is complete but wrong, and one that is too long."""
    size = len(server.files[ONE])
    asked = {bytes(100): ["bytes=100-", None], bytes(size): [None], server.files[ONE] + b"more": [None]}
    for content, expected in asked.items():
        partial(folder).mkdir(parents=True)
        (partial(folder) / ONE).write_bytes(content)
        server.requests.clear()
        fetch_right(folder, server)
        assert server.asked(ONE) == expected
        shutil.rmtree(folder)


def test_a_new_commit_replaces_the_changed_files(server, folder):
    partial(folder).mkdir(parents=True)
    for name in NEEDED:
        (partial(folder) / name).write_bytes(server.files[name])
    (partial(folder) / "model.safetensors").write_text("no longer part of the model")
    server.commit = "f" * 40
    server.files["config.json"] += b"\n"
    server.files[ONE] = server.files[ONE][:-4] + b"\0\0\0\0"
    fetch_right(folder, server)
    assert all(server.commit in path for path, _ in server.requests if path != LISTING)
    assert server.asked("config.json") and not server.asked(TWO)


def endless(handler):
    handler.answer(b"[", length=-1)
    with contextlib.suppress(OSError):
        for _ in range(10_000):
            handler.wfile.write(b"[" * 1000)


LISTINGS = [
    b"<html>Please log in</html>",
    b"[" * 100_000,
    b"[]",
    b"{}",
    b'{"sha": "main", "siblings": [3]}',
    b'{"sha": "main", "siblings": [{"rfilename": ["x"]}]}',
    b'{"sha": "main", "siblings": [{"rfilename": 3}]}',
]


@pytest.mark.parametrize("answer", [*map(other, LISTINGS), cut(0.5), endless])
def test_an_answer_that_is_no_listing(server, folder, monkeypatch, answer):
    monkeypatch.setattr(downloads, "MOST_JSON", 150_000)
    server.faults[LISTING] = [answer]
    refused(REPOSITORY, "list")
    assert not folder.parent.exists()


@pytest.mark.parametrize("change", REFUSED["entries of the hub's listing"])
def test_a_listing_without_a_right_size_or_hash(server, folder, change):
    listing = server.listing()
    next(entry for entry in listing["siblings"] if entry["rfilename"] == ONE).update(change)
    server.faults[LISTING] = [other(json.dumps(listing).encode())]
    refused()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("lacks", "holds"),
    [
        ("config.json", "adapter_config.json"),
        ("tokenizer.json", "README.txt"),
        (INDEX, "pytorch_model.bin"),
        ("config.json", "tiny-Q4_K_M.gguf"),
    ],
)
def test_a_repository_that_lacks_a_needed_file(server, folder, lacks, holds):
    """The error names it, and what the repository holds in its place."""
    del server.files[lacks]
    server.files[holds] = b"x"
    refused(REPOSITORY, lacks, "" if holds == "README.txt" else repr(holds))
    assert len(server.requests) == 1
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/tmp/x.safetensors", "a/model-00001-of-00002.safetensors", "a\\x.safetensors"),
        *("../config.json", ".lock", "..", ".x.safetensors", f"{ONE}\n", f"{ONE}\0", "", ONE.upper()),
        "model-00001-of-00002.safetensors.index.json",
    ],
)
def test_other_names_in_the_listing_are_not_fetched(server, folder, name):
    listing = server.listing()
    listing["siblings"].append({**hub_server.entry("x.safetensors", b"x"), "rfilename": name})
    server.faults[LISTING] = [other(json.dumps(listing).encode())]
    fetch_right(folder, server)
    assert len(server.requests) == 2 + len(NEEDED)


# ---- Refusals, redirects and the token


@pytest.mark.parametrize(
    ("where", "code", "said"),
    [
        (LISTING, 401, "check the name"),  # of a repository that is missing, if there is no token
        (LISTING, 404, "check the name and the revision"),
        (INDEX, 401, "accept its licence on its page, and set HF_TOKEN"),
        (ONE, 403, "accept its licence on its page, and set HF_TOKEN"),
        (ONE, 404, ONE),
    ],
)
def test_a_refusal_is_not_tried_again(server, folder, where, code, said):
    server.faults[where] = [status(code)]
    refused(str(code), said)
    assert len([path for path, _ in server.requests if path.endswith(where)]) == 1
    fetch_right(folder, server)


def test_addresses_that_lead_nowhere(server, monkeypatch):
    """Redirects that go in a circle or to no web page, and a port at which nobody listens."""
    server.faults[LISTING] = [redirect(LISTING)] * 100
    refused("302")
    assert len(server.requests) < 12
    del server.faults[LISTING]
    for address in ("ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "http://x:port/"):
        server.faults[ONE] = [redirect(address)] * TRIES
        refused("127.0.0.1", ONE)
    monkeypatch.setattr(downloads, "PAUSES", (60,))  # a host that cannot be reached is not asked again
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("POP_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        refused("Connection refused")


def authorizations(server: HubServer) -> set[str | None]:
    return {headers.get("Authorization") for _, headers in server.requests}


def test_the_token_goes_to_the_endpoint(secure, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    secure.faults[ONE] = [redirect(f"/{REPOSITORY}/resolve/{COMMIT}/{ONE}?again"), status(500)]
    secure.faults[f"{ONE}?again"] = [redirect(ONE)]
    download("tiny")
    assert_right(folder, secure)
    assert authorizations(secure) == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capsys.readouterr())
    assert all(TOKEN.encode() not in path.read_bytes() for path in folder.iterdir())


def test_the_token_does_not_follow_a_redirect_to_another_origin(secure, folder, start):
    elsewhere = start(secure.certificate)
    back = []

    def welcome_back(handler):
        back.append(dict(handler.headers))
        handler.file()

    secure.faults = {name: [hub_server.redirect_home(elsewhere)] for name in (LISTING, INDEX, ONE, TWO)}
    elsewhere.faults[TWO] = [hub_server.redirect_home(secure)]  # it does not get the token back by sending us back
    secure.faults[TWO].append(welcome_back)
    fetch()
    assert_right(folder, secure)
    assert len(elsewhere.requests) == 4 and authorizations(elsewhere) == {None}
    assert len(back) == 1 and "Authorization" not in back[0]


def test_behind_a_proxy_the_token_belongs_to_the_same_origin():
    """urllib puts the proxy's host into a request."""
    request = Request("https://hub.test/a")
    request.add_unredirected_header("Authorization", TOKEN)
    request.set_proxy("proxy.test:3128", "https")
    redirects = downloads._Redirects()
    for url, follows in (("https://hub.test/b", True), ("https://proxy.test:3128/b", False)):
        redirected = redirects.redirect_request(request, None, 302, "", {}, url)
        assert ("Authorization" in redirected.unredirected_hdrs) == follows


def test_the_token_is_not_sent_over_plain_http(secure, server, folder, monkeypatch):
    secure.faults[ONE] = [hub_server.redirect_home(server)] * TRIES
    refused("leaves https")
    assert server.requests == []
    monkeypatch.setenv("POP_ENDPOINT", server.url)
    fetch_right(folder, server)
    assert authorizations(server) == {None}


@pytest.mark.parametrize("token", ["hf_Secret\nX-More: 1", "hf_Sécret", "hf Secret", "hf_Secret\x7f"])
def test_a_malformed_token_is_not_repeated(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert "cret" not in refused("HF_TOKEN")
    assert server.requests == []


@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_token_of_a_login_is_used_if_none_is_set(secure, folder, tmp_path, monkeypatch, variable):
    """In the files where `hf auth login` stores it."""
    for name in ("HF_HOME", "HF_TOKEN", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # counts as not set
    inside = {"HF_HOME": "token", "XDG_CACHE_HOME": "huggingface/token"}
    path = tmp_path / "at" / inside.get(variable, ".cache/huggingface/token")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{TOKEN}\n")
    monkeypatch.setenv(variable, str(tmp_path / "at"))
    fetch()
    assert authorizations(secure) == {f"Bearer {TOKEN}"}
    monkeypatch.setenv("HF_TOKEN", "hf_Other")
    shutil.rmtree(folder)
    secure.requests.clear()
    fetch()
    assert authorizations(secure) == {"Bearer hf_Other"}


def test_a_certificate_that_cannot_be_verified(secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    refused("127.0.0.1", "certificate verify failed")
    assert secure.requests == []


def test_too_little_disk_space(server, folder, monkeypatch):
    """Only missing bytes need space."""
    disk = SimpleNamespace(free=len(server.files["config.json"]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    refused(REPOSITORY, "make room", "POP_WEIGHTS")
    assert len(server.requests) == 2  # only config.json was asked for
    assert list(folder.parent.iterdir()) == []
    partial(folder).mkdir()
    (partial(folder) / TWO).write_bytes(server.files[TWO][:1000])
    disk.free = sum(len(server.files[name]) for name in NEEDED) - 1001
    refused("make room")
    disk.free += 1
    fetch_right(folder, server)


def test_a_disk_that_fills_up(server, folder):
    assert len(server.files[TWO]) > 20_000 > len(server.files["tokenizer.json"])
    with full_disk(room=20_000):
        refused(f"{partial(folder)} is kept", os.strerror(errno.EFBIG), error=CheckpointError)
    assert not folder.exists()
    server.requests.clear()
    fetch_right(folder, server)
    assert "bytes=20000-" in server.asked(ONE) + server.asked(TWO)


def test_a_second_process_waits_and_finds_the_files(server, folder, capsys):
    waiting = threading.Event()

    def hold(handler):
        waiting.wait(60)
        handler.file()

    server.faults[ONE] = [hold]
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(fetch) for _ in range(2)]
        while "Waiting for another process" not in capsys.readouterr().err:
            time.sleep(0.01)
        waiting.set()
    assert_right(folder, server)
    assert [result.result() for result in results] == [folder, folder]
    assert server.asked(ONE) == [None]
