"""Progress without tqdm: a line every few seconds, from any number of threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pop.system import progress
from pop.system.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as the progress sees it. tqdm is missing."""
    now = [100.0]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_few_seconds(clock, capsys):
    with progress_bar("loading weights", 2000, "B") as step:
        for seconds in (1, 3, 1, 1, 30, 1):
            clock[0] += seconds
            step(250)
    assert capsys.readouterr().err == "loading weights: 38%\nloading weights: 62%\n"


def test_units_taken_back_and_threads(clock, capsys):
    with progress_bar("x", 100, "it") as step:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(step, [10] * 8))
        clock[0] += 5
        step(-30)
    assert capsys.readouterr().err == "x: 50%\n"


def test_unwanted_or_quick_work_prints_nothing(clock, capsys):
    with progress_bar("x", 10, "it", wanted=False) as step:
        clock[0] += 50
        step(1)
    with progress_bar("x", 10, "it") as step:
        step(10)
    assert capsys.readouterr() == ("", "")
