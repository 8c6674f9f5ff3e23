"""Signals that end a run: at once where nothing is lost, later where something would be, and at once if repeated."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from blockskip_hooks.training.stop_signals import Interrupted, StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_where_nothing_is_lost(number: signal.Signals):
    before = signal.getsignal(number)
    with StopSignals(), pytest.raises(Interrupted, match=f"{number.name}.*--resume_from_checkpoint latest") as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.number == number and signal.getsignal(number) is before


def test_a_held_signal_waits_for_a_check(capsys: pytest.CaptureFixture[str]):
    done = []
    with StopSignals() as stop, pytest.raises(Interrupted), stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the work in hand")
        stop.check()
        done.append("more")
    assert done == ["the work in hand"]
    assert "once more to end at once" in capsys.readouterr().err


def test_nothing_begins_after_a_signal():
    stop = StopSignals()
    stop.received = signal.SIGTERM
    with pytest.raises(Interrupted), stop.held():
        pytest.fail("began")


def twice(under_a_launcher: bool) -> None:
    """Body of a process that gets the same signal twice in a row."""
    if under_a_launcher:
        os.environ["LOCAL_RANK"] = "0"
    with StopSignals() as stop, stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(7)


@pytest.mark.parametrize(("under_a_launcher", "code"), [(False, -signal.SIGTERM), (True, 7)])
def test_a_second_signal_ends_at_once_unless_a_launcher_passed_on_the_first(under_a_launcher: bool, code: int):
    process = multiprocessing.get_context("fork").Process(target=twice, args=(under_a_launcher,))
    process.start()
    process.join()
    assert process.exitcode == code
