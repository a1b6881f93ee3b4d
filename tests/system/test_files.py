"""Files and folders appear whole or not at all, also when two writers meet. See also test_failures.py."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.disk import full_disk

from pop.errors import CheckpointError, PlanError
from pop.system import files
from pop.system.files import read_json, staged, write_whole


def write(folder, text="whole"):
    with staged(folder) as partial:
        (partial / "file").write_text(text)
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, CheckpointError)])
def test_a_block_that_fails_leaves_nothing(tmp_path, error, raised):
    with pytest.raises(raised), staged(tmp_path / "model") as partial:
        (partial / "file").write_text("half")
        raise error("no")
    assert names(tmp_path) == []
    assert (write(tmp_path / "model") / "file").read_text() == "whole"
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["file"]


def test_the_lock_is_removed_or_already_gone(tmp_path):
    with staged(tmp_path / "model") as partial:
        (partial / "file").touch()
        assert names(tmp_path) == [".model.lock", ".model.partial"]
        (tmp_path / ".model.lock").unlink()
    assert names(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_replaced_is_left_unchanged(tmp_path, monkeypatch):
    """The shell would stay in a deleted current folder, and the root has no name. An empty folder can be replaced."""
    for name in ("model", "here", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "model")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "target") == ["file"]
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path / "model", tmp_path / "a file", ".", "/"):
        with pytest.raises(CheckpointError, match="choose another"):
            write(folder, "other")
    assert (tmp_path / "model" / "file").read_text() == "whole"
    assert names(tmp_path) == ["a file", "here", "link", "model", "target"] and names(tmp_path / "here") == []


@pytest.mark.parametrize("first_fails", [False, True])
def test_a_second_writer_waits(tmp_path, monkeypatch, first_fails):
    """It finds the folder in use, or writes what the first has not written."""
    waiting, calls, outcomes = threading.Event(), [], []
    monkeypatch.setattr(files, "print", lambda *args, **kwargs: waiting.set(), raising=False)

    def run():
        try:
            with staged(tmp_path / "model") as partial:
                assert waiting.wait(20)
                calls.append(names(partial))
                (partial / "file").touch()
                if first_fails and len(calls) == 1:
                    raise CheckpointError("the first fails")
            outcomes.append("written")
        except CheckpointError as error:
            outcomes.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run(), range(2)))
    (error,) = set(outcomes) - {"written"}
    assert len(outcomes) == 2 and ("the first fails" if first_fails else "exists already") in error
    assert calls == [[]] * (2 if first_fails else 1)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["file"]


def test_a_file_is_written_through_a_link_and_the_old_one_is_kept_on_failure(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with full_disk(room=2), pytest.raises(PlanError, match=r"the plan cannot be written to .*link \("):
        write_whole(tmp_path / "link", b"half", "the plan", PlanError)
    assert (tmp_path / "target").read_text() == "old" and names(tmp_path) == ["link", "target"]
    write_whole(tmp_path / "link", b"new", "the plan", PlanError)
    assert os.path.islink(tmp_path / "link") and (tmp_path / "target").read_text() == "new"
    assert names(tmp_path) == ["link", "target"]


def test_a_file_that_is_saved_over_keeps_its_mode(tmp_path):
    """Until then, only its owner can read the new one."""
    path = tmp_path / "plan"
    for mode in (0o600, 0o640, 0o444):
        path.write_text("old")
        path.chmod(mode)
        with files.replaced(path, "the plan", PlanError) as draft:
            draft.write_text("new")
            assert draft.stat().st_mode & 0o777 == 0o600
        assert path.stat().st_mode & 0o777 == mode and path.read_text() == "new"
        path.unlink()


def test_a_full_disk_is_noticed_before_the_work(tmp_path):
    """It still takes empty files."""
    with full_disk(), pytest.raises(PlanError, match="the plan cannot be written"):
        files.check_writable(tmp_path / "plan", "the plan", PlanError)
    files.check_writable(tmp_path / "plan", "the plan", PlanError)
    with pytest.raises(PlanError, match=r"the plan takes about 1,000,000,000,000,000,000 bytes, but .* free"):
        files.check_writable(tmp_path / "plan", "the plan", PlanError, size=10**18)
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', "[" * 100_000, "\udcff"])
def test_read_json_raises_the_given_error(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(PlanError, match="file.json"):
        read_json(path, PlanError)
    with pytest.raises(PlanError, match="absent.json"):
        read_json(tmp_path / "absent.json", PlanError)
