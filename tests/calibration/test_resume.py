"""Saved progress of a run: what is read back, and which files are refused."""

import os

import pytest
import torch
from safetensors.torch import save_file

from pop import InputError
from pop.calibration.resume import SavedProgress

RUN = "a hash"
FOUND = {"layers": [1, 3], "full_depth_selected": 0.1}
TENSORS = {"steps": torch.tensor(3), "weight": torch.arange(6.0).view(2, 3)}


def test_what_was_written_is_read(tmp_path, monkeypatch):
    """In the home folder, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = SavedProgress("~/progress", RUN)
    assert saved.read() is None
    saved.write(TENSORS, FOUND)
    assert (tmp_path / "progress").exists()
    found, decided = saved.read()
    assert {*found} == {*TENSORS} and decided == FOUND
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_failed_write_keeps_the_file_before_it(tmp_path, monkeypatch, caplog):
    saved = SavedProgress(tmp_path / "progress", RUN)
    saved.write(TENSORS, FOUND)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    saved.write({"steps": torch.tensor(4), "weight": TENSORS["weight"]}, FOUND)
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert saved.read()[0]["steps"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["progress"]


def test_the_progress_of_another_run_is_refused(tmp_path):
    path = tmp_path / "progress"
    SavedProgress(path, RUN).write(TENSORS, FOUND)
    with pytest.raises(InputError, match="belongs to a run with another"):
        SavedProgress(path, "another hash").read()
    save_file(TENSORS, path)
    with pytest.raises(InputError, match="belongs to a run with another"):
        SavedProgress(path, RUN).read()


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = SavedProgress(None, RUN)
    saved.write(TENSORS, FOUND)
    assert saved.read() is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", range(3))
def test_a_broken_file_is_refused(tmp_path, broken):
    path = tmp_path / "progress"
    saved = SavedProgress(path, RUN)
    saved.write(TENSORS, FOUND)
    content = path.read_bytes()
    [
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(content[:-10]),
        lambda: path.write_text("[" * 10**5),
    ][broken]()
    with pytest.raises(InputError, match="progress does not hold"):
        saved.read()


def test_a_path_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    SavedProgress(tmp_path / "missing" / "progress", RUN).write(TENSORS, FOUND)
    assert "cannot be written" in caplog.text


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not hold"):
        SavedProgress(tmp_path, RUN).read()
