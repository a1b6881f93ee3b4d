"""Progress: a line every few seconds, or one that is rewritten on a terminal, from any number of threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pop.system import progress
from pop.system.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as the progress sees it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def load(clock) -> None:
    with progress_bar("loading weights", 2000) as step:
        for seconds in (1, 3, 1, 1, 30, 1):
            clock[0] += seconds
            step(250, f"after {seconds} s")


def test_a_line_every_few_seconds(clock, capsys):
    """It has what is done, the time that is left at this speed, and the note."""
    load(clock)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["loading weights: 38%, 0:00:08 left after 1 s", "loading weights: 62%, 0:00:22 left after 30 s"]


def test_a_terminal_gets_a_line_that_is_rewritten_and_cleared_at_the_end(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt), progress_bar("x", 10) as step:
        for seconds in (0.1, 1, 0.1, 1):
            clock[0] += seconds
            step(2)
        raise KeyboardInterrupt
    expected = ["", "x: 40%, 0:00:02 left", "x: 80%, 0:00:01 left", ""]
    assert capsys.readouterr().err.split("\r\x1b[K") == expected


def test_units_taken_back_and_threads(clock, capsys):
    with progress_bar("x", 100) as step:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(step, [10] * 8))
        clock[0] += 5
        step(-30)
        clock[0] += 5
        step(-50)
    assert capsys.readouterr().err == "x: 50%, 0:00:05 left\nx: 0%, 0:16:40 left\n"


def test_unwanted_or_quick_work_prints_nothing(clock, capsys):
    with progress_bar("x", 10, wanted=False) as step:
        clock[0] += 50
        step(1)
    with progress_bar("x", 10) as step:
        step(10)
    assert capsys.readouterr() == ("", "")
