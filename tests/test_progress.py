"""What is shown of a run: bars on a terminal, short lines elsewhere, and honest times left."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from blockskip_hooks.reporting import progress as progress_module
from blockskip_hooks.reporting.progress import Display, Progress, listed, set_log_level
from blockskip_hooks.utils.monitor import StageMonitor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is told to go on."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now.seconds)
    return now


@contextlib.contextmanager
def on_terminal() -> Iterator[Terminal]:
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_elsewhere_than_on_a_terminal_a_line_per_tenth_that_took_a_while(clock, capsys):
    with Display("train", 100, "step") as display:
        for _ in range(100):
            clock.seconds += 0.5
            display.update()
    said = lines(capsys)
    assert said[0] == "train: 10/100 steps (10%)" and said[-1] == "train: 100/100 steps (100%)"
    assert len(said) == 10 and not any("\r" in line for line in said)


def test_quick_work_has_its_last_line_only(clock, capsys):
    with Display("train", 1000, "step") as display:
        for _ in range(1000):
            clock.seconds += 0.001
            display.update()
    assert lines(capsys) == ["train: 1000/1000 steps (100%)"]


def test_slow_work_is_never_silent_for_long(clock, capsys):
    with Display("train", 1000, "step") as display:
        for _ in range(10):
            clock.seconds += 20
            display.update()
    assert len(lines(capsys)) == 5


def test_a_terminal_has_one_bar_that_is_drawn_again():
    with on_terminal() as terminal, Display("train", 3, "step", figures=lambda: ["loss 0.5"]) as display:
        for _ in range(3):
            display.update()
    drawn = terminal.getvalue()
    assert "\r" in drawn and "3/3" in drawn and "loss 0.5" in drawn and drawn.count("\n") == 1


def test_what_is_not_shown_says_nothing(clock):
    with on_terminal() as terminal:
        assert list(listed("abc", "Letters", "letter", total=3, shown=False)) == ["a", "b", "c"]
        with Progress.silent().stage("train", steps=2) as stage:
            stage.update(2)
    assert terminal.getvalue() == ""


def test_other_processes_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with Display("Loading photos", 1, "photo") as display:
        display.update()
    assert lines(capsys) == []


def test_nothing_to_do_says_nothing(capsys):
    with Progress().stage("precompute", photos=0, records=0) as stage:
        stage.begin("records")
    assert lines(capsys) == []


def test_time_left_is_predicted_then_corrected_and_then_measured(clock):
    progress = Progress()
    progress.expect("records", 10, 1.0)
    progress.expect("steps", 20, 0.5)
    assert progress.seconds_left() == 20.0
    with progress.stage("precompute", records=10) as stage:
        for _ in range(5):
            clock.seconds += 2.0
            stage.update()
        # Records take twice as long as predicted; so will steps, but for a twentieth of the 20 s that speaks for 1 s.
        assert progress.seconds_left() == pytest.approx(5 * 2.0 + 20 * 0.5 * (10 + 1) / (5 + 1))
        for _ in range(5):
            clock.seconds += 2.0
            stage.update()
    with progress.stage("train", steps=20) as stage:
        clock.seconds += 3.0
        stage.update()
        assert progress.seconds_left() == 19 * 3.0


def test_one_small_piece_that_takes_long_does_not_make_the_whole_run_long(clock):
    progress = Progress()
    progress.expect("prompts", 2, 0.1)
    progress.expect("steps", 100, 1.0)
    with progress.stage("encode", prompts=2) as stage:
        clock.seconds += 3.0
        stage.update()
    assert progress.seconds_left() < 3.0 + 100 * 1.7


def test_without_a_prediction_the_run_has_no_time_left_until_it_is_measured(clock, capsys):
    progress = Progress()
    progress.expect("steps", 2)
    progress.expect("images", 1)
    with progress.stage("train", steps=2) as stage:
        clock.seconds += 40
        stage.update()
    assert progress.seconds_left() is None
    (line,) = lines(capsys)
    assert "00:40 left, run – left" in line and "40 s/step" in line


def test_what_is_there_already_does_not_count_as_fast(clock):
    progress = Progress()
    with progress.stage("precompute", records=100) as stage:
        stage.skip(98)
        clock.seconds += 4.0
        stage.update()
    assert progress.seconds_of("records") == 4.0 and progress.seconds_left() == 4.0


def test_a_stage_in_parts_has_one_display_and_its_whole_time_left(clock):
    progress = Progress()
    progress.expect("records", 2, 10.0)
    with on_terminal() as terminal, progress.stage("precompute", photos=2, records=2) as stage:
        clock.seconds += 1.0
        stage.update(2)
        stage.begin("records")
        clock.seconds += 5.0
        stage.update(2)
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1 and "precompute (photos)" in drawn and "00:20 left" in drawn
    assert drawn.rstrip("\n").split("\r")[-1].startswith("precompute (records) 100%")


def test_parts_of_a_stage_that_goes_on_later_end_without_a_line(clock, capsys):
    progress = Progress()
    progress.expect("records", 40)
    for _ in range(4):
        with progress.stage("precompute", records=10) as stage:
            stage.update(10)
    assert len(lines(capsys)) == 1


def test_loss_with_its_mean_and_memory_now_and_at_its_peak(clock, capsys):
    monitor = StageMonitor()
    progress = Progress(monitor)
    with monitor.stage("train"), progress.stage("train", initial=1, steps=3) as stage:
        clock.seconds += 1
        progress.losses = [1.0, 2.0]
        stage.update()
        progress.losses = [1.0, 2.0, 3.0]
        stage.update()
    (line,) = lines(capsys)
    assert line.startswith("train: 3/3 steps (100%), 2 steps/s, took 00:01")
    assert "loss 3.0000 (mean 2.0000)" in line and re.search(r"\d [MG]iB \(peak", line)


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
