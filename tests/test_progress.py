"""What is shown of a run: bars on a terminal, about ten lines in a log, and honest times left."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from blockskip_hooks.reporting.progress import Progress, set_log_level
from blockskip_hooks.utils.monitor import StageMonitor
from blockskip_hooks.utils.progress import SILENT, listed, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is told to go on."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("tqdm.std.time", lambda: now.seconds)
    return now


@contextlib.contextmanager
def on_terminal() -> Iterator[Terminal]:
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_who_wants_no_bars_gets_no_lines(monkeypatch: pytest.MonkeyPatch, capsys):
    """``TQDM_DISABLE`` reaches tqdm where it is imported, as this setting."""
    monkeypatch.setattr("blockskip_hooks.utils.progress.LogLines.__init__", disabled)
    with contextlib.closing(progress_bar("train", 2, "step")) as bar:
        bar.update(2)
    assert lines(capsys) == []


def disabled(self: tqdm, **settings: Any) -> None:
    tqdm.__init__(self, **settings, disable=True)


@pytest.mark.parametrize("seconds", [0.5, 20.0])
def test_a_log_gets_about_ten_lines(seconds: float, clock, capsys):
    with contextlib.closing(progress_bar("train", 1000, "step")) as bar:
        for _ in range(1000):
            clock.seconds += seconds
            bar.update()
    said = lines(capsys)
    assert 10 <= len(said) <= 11 and not any("\r" in line for line in said)
    assert "1000/1000 steps (100%)" in said[-1]


def test_quick_work_has_its_last_line_only(clock, capsys):
    with contextlib.closing(progress_bar("train", 1000, "step")) as bar:
        for _ in range(1000):
            clock.seconds += 0.001
            bar.update()
    (line,) = lines(capsys)
    assert "1000/1000" in line


def test_slow_work_soon_has_a_line_with_its_rate_and_the_time_left(clock, capsys):
    with contextlib.closing(progress_bar("train", 1000, "step")) as bar:
        for _ in range(12):
            clock.seconds += 2
            bar.update()
    (line,) = lines(capsys)
    assert "5/1000" in line and "2.00s/step, 00:10 gone, 33:10 left" in line


def test_rates_of_a_log_are_seconds_a_piece_however_fast(clock, capsys):
    with contextlib.closing(progress_bar("train", 40, "step")) as bar:
        for _ in range(40):
            clock.seconds += 0.5
            bar.update()
    said = lines(capsys)
    assert len(said) >= 5 and all("0.50s/step" in line for line in said)


def test_a_stage_that_goes_on_keeps_its_rate_and_time(clock, capsys):
    """Stretches train in turn with their records; the line of the second is of both."""
    progress = Progress()
    for first in (0, 50):
        with progress.stage("train", first, steps=100) as stage:
            for _ in range(50):
                clock.seconds += 3 if first else 1
                stage.update()
        clock.seconds += 500  # The next stretch's records.
    last = lines(capsys)[-1]
    assert "100/100" in last and "03:20 gone" in last and "2.00s/step" in last


def work(clock: SimpleNamespace, progress: Progress, name: str, done: range, seconds: float, **pieces: int) -> None:
    """A part of a stage, at an even pace."""
    with progress.stage(name, done.start, **pieces) as stage:
        for kind in pieces:
            stage.begin(kind)
            for _ in done:
                clock.seconds += seconds
                stage.update()


def in_turns(clock: SimpleNamespace) -> None:
    """Four stretches, of 20 records and 10 steps each, and images in between."""
    progress = Progress()
    for stretch in range(4):
        work(clock, progress, "precompute", range(20 * stretch, 20 * stretch + 20), 1, crops=80, records=80)
        work(clock, progress, "train", range(10 * stretch, 10 * stretch + 10), 5, steps=40)
        work(clock, progress, "validate", range(2), 30, images=2)


def test_stages_that_take_turns_say_the_time_that_is_left_of_all_of_them(clock, capsys):
    in_turns(clock)
    said = lines(capsys)
    # Nothing is said of what has not been measured: each has its own time left in the first stretch.
    assert [line for line in said if "precompute (records): 16/80" in line and "01:04 left, peak" in line]
    assert [line for line in said if "train: 8/40" in line and "02:40 left, peak" in line]
    # 20 of 40 steps left at 5 s, and 40 of 80 crops and records at 1 s each.
    assert [line for line in said if "train: 20/40" in line and "03:00 left with crops and records" in line]
    # 40 records left, as many crops, 30 steps.
    assert [
        line for line in said if "precompute (records): 40/80" in line and "03:50 left with crops and steps" in line
    ]
    assert "00:00 left, peak" in [line for line in said if "train" in line][-1]
    left = [
        60 * int(match[1]) + int(match[2]) for line in said if (match := re.search(r"(\d+):(\d+) left with", line))
    ]
    assert len(left) >= 10 and left == sorted(left, reverse=True)


def test_a_bar_shows_the_time_that_is_left_of_all_stages_that_take_turns(clock):
    with on_terminal() as terminal:
        in_turns(clock)
    assert "20/40 [01:40<03:00, " in terminal.getvalue() and "with" not in terminal.getvalue()


def test_images_that_are_made_again_have_a_rate_of_their_own(clock, capsys):
    in_turns(clock)
    assert {line.split(", ")[1] for line in lines(capsys) if "validate" in line} == {"30.00s/image"}


def test_a_bar_that_goes_on_shows_the_time_left_from_its_first_drawing(clock):
    progress = Progress()
    with on_terminal() as terminal:
        for first in (0, 50):
            with progress.stage("train", first, steps=100) as stage:
                for _ in range(50):
                    clock.seconds += 2
                    stage.update()
    drawn = [text for text in terminal.getvalue().split("\r") if "100 [" in text]
    again = next(text for text in drawn[1:] if "50/100" in text and "peak" not in text)
    assert "[01:40<01:40, " in again and "2.00s/step" in again
    assert sum("00:00<?" in text for text in drawn) == 1


def test_times_left_never_grow_or_fall_below_zero_at_an_even_pace(clock, capsys):
    with contextlib.closing(progress_bar("train", 100, "step", initial=40)) as bar:
        for _ in range(60):
            clock.seconds += 3
            bar.update()
    left = [
        60 * int(match[1]) + int(match[2]) for line in lines(capsys) if (match := re.search(r"(\d+):(\d+) left", line))
    ]
    assert len(left) >= 5 and left == sorted(left, reverse=True) and left[0] == 168 and left[-1] == 0


def test_a_terminal_has_one_bar_that_is_drawn_again():
    with on_terminal() as terminal, Progress().stage("train", steps=3) as stage:
        for _ in range(3):
            stage.update(loss=0.5)
    drawn = terminal.getvalue()
    assert "\r" in drawn and "3/3" in drawn and "0.5000" in drawn and drawn.count("\n") == 1


def test_what_is_not_shown_says_nothing():
    with on_terminal() as terminal:
        assert list(listed("abc", "Letters", "letter", total=3, shown=False)) == ["a", "b", "c"]
        for progress in (Progress(shown=False), SILENT):
            with progress.stage("train", photos=2, steps=2) as stage:
                stage.skip(1)
                stage.begin("steps")
                stage.update(2, loss=1.0)
    assert terminal.getvalue() == ""


def test_other_processes_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert list(listed("a", "Loading photos", "photo", total=1)) == ["a"]
    assert lines(capsys) == []


def test_nothing_to_do_says_nothing(capsys):
    with Progress().stage("precompute", photos=0, records=0) as stage:
        stage.begin("records")
    with Progress().stage("precompute", records=5) as stage:
        stage.skip(5)
    assert lines(capsys) == []


def test_what_is_there_already_does_not_count_as_fast(clock, capsys):
    with Progress().stage("precompute", records=100) as stage:
        stage.skip(98)
        clock.seconds += 40.0
        stage.update()
    (line,) = lines(capsys)
    assert "99/100" in line and "40.00s/record" in line and "00:40 left" in line


def test_a_stage_of_two_kinds_of_pieces_keeps_one_bar():
    with on_terminal() as terminal, Progress().stage("precompute", photos=2, records=2) as stage:
        stage.update(2)
        stage.begin("records")
        stage.update(2)
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1 and "precompute (photos)" in drawn
    assert drawn.rstrip("\n").split("\r")[-1].startswith("precompute (records): 100%")


def test_parts_of_a_stage_share_one_display(clock, capsys):
    progress = Progress()
    with on_terminal() as terminal:
        for done in range(0, 40, 10):
            with progress.stage("precompute", done, records=40) as stage:
                stage.update(10)
    assert terminal.getvalue().count("\n") == 1
    for done in range(0, 40, 10):
        with progress.stage("precompute", done, records=40) as stage:
            stage.update(10)
    (line,) = lines(capsys)
    assert "40/40" in line


def test_the_mean_of_recent_losses_and_the_peak_of_the_memory(clock, capsys, monkeypatch: pytest.MonkeyPatch):
    monitor = StageMonitor()
    # Not that of the process, which depends on the tests before.
    monkeypatch.setattr(monitor, "memory", lambda: (2**30, 3 * 2**29))
    with monitor.stage("train"), Progress(monitor).stage("train", 1, steps=3) as stage:
        clock.seconds += 1
        stage.update(loss=1.0)
        stage.update(loss=2.0)
    (line,) = lines(capsys)
    assert "3/3 steps (100%), 0.50s/step" in line and "1.5000" in line and line.endswith("peak 1.50 GiB")


@pytest.mark.parametrize(
    ("level", "rank", "said"),
    [("debug", "0", "diwe"), ("info", "0", "iwe"), ("warning", "0", "we"), ("error", "0", "e"), ("debug", "1", "e")],
)
def test_log_level(level, rank, said, monkeypatch, caplog):
    monkeypatch.setenv("RANK", rank)
    package, root = logging.getLogger("blockskip_hooks"), logging.getLogger()
    before = package.level, root.level
    try:
        set_log_level(level)
        for name in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger("blockskip_hooks.anything"), name)(name[0])
        assert not logging.getLogger("a.library").isEnabledFor(logging.INFO)
    finally:
        package.setLevel(before[0])
        root.setLevel(before[1])
    assert "".join(record.message for record in caplog.records) == said
