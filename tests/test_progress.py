"""The line that says how far, how fast and how long still."""

import pytest

from kit import progress as module
from kit.progress import PROGRESS_FILE, Progress, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only where a test turns it."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_progress_says_how_far_and_how_long(monkeypatch, tmp_path):
    path = tmp_path / "progress"
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    with progress(4, "extract", "pages") as bar:
        bar.update(2)
        assert "2/4 pages" in bar.line() and "s left" in bar.line()
        bar.note("loss 2.1")
    assert path.read_text().startswith("extract 2/4 pages") and "loss 2.1" in path.read_text()


def test_what_an_earlier_process_did_says_nothing_of_the_time_left(clock):
    bar = Progress(10, "sft", "steps")
    clock[0] += 60  # loading a model
    bar.begin(done=6, planned_seconds=8)
    assert bar.line() == "sft 6/10 steps · 8 s left by the plan"
    clock[0] += 5
    bar.update()
    assert bar.line() == "sft 7/10 steps · 0.20 steps/s · 15 s left"


def test_the_first_unit_is_left_out_of_the_time_left(clock):
    bar = Progress(10, "sft", "steps")
    clock[0] += 11  # cold
    bar.update()
    clock[0] += 2
    bar.update()
    assert bar.line().endswith("· 16 s left"), "8 steps of two seconds"
    clock[0] += 2 * 8
    bar.update(8)
    assert "left" not in bar.line()
