"""Lines about a long stage: how much is done, and how long the rest takes."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from pipelines.run import progress
from pipelines.run.progress import Countdown, StillWorking, duration


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_rest_is_estimated_from_this_jobs_speed(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 of 100 were there before: 20 in 10 s leave 10 s for the last 20."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    countdown = Countdown(console, "signals", 100, "shards", done=60)
    for _ in range(20):
        clock[0] += 1.0
        countdown.add()
    assert lines(console) == ["  signals: 75 of 100 shards, 25 s left"]
    clock[0] += progress.EVERY_S
    countdown.add(20)
    assert len(lines(console)) == 1, "the driver says when a stage is done"


def test_work_of_unknown_size_says_that_it_goes_on(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    with StillWorking(console, "prepare: tokenising the train rows"):
        time.sleep(0.3)
    found = lines(console)
    assert found and all(re.fullmatch(r"  prepare: tokenising the train rows: .* s so far", line) for line in found)
    time.sleep(0.2)
    assert lines(console) == found


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (90, "90 s"), (150, "2.5 minutes"), (8000, "2.2 hours"), (3e5, "3.5 days")]
)
def test_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
