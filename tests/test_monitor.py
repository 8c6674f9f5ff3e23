"""What a stage costs, and files that survive a failed write."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from blockskip_hooks.utils import device_memory, files, machine
from blockskip_hooks.utils import monitor as monitor_module
from blockskip_hooks.utils.files import write_json
from blockskip_hooks.utils.formatting import format_bytes, format_seconds
from blockskip_hooks.utils.machine import versions
from blockskip_hooks.utils.monitor import StageMonitor
from blockskip_hooks.version import __version__


def test_a_stage_entered_again_adds_seconds_and_keeps_its_place(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: next(clock))
    monitor = StageMonitor()
    # threading keeps its own reference to the real clock.
    for name in ("precompute", "train", "precompute"):
        with monitor.stage(name):
            pass
    assert [(stage["name"], stage["seconds"]) for stage in monitor.as_list()] == [("precompute", 6.0), ("train", 3.0)]


def test_a_running_stage_is_listed_with_its_cost_so_far(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.5, 13.0])
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: next(clock))
    monitor = StageMonitor()
    with monitor.stage("train"):
        pass
    with monitor.stage("train"):
        (running,) = monitor.as_list()
    (ended,) = monitor.as_list()
    assert (running["seconds"], ended["seconds"]) == (3.5, 5.0)
    assert 0 < running["peak_rss_bytes"] <= ended["peak_rss_bytes"]


def test_peak_memory_is_that_of_the_stage_and_the_maximum_over_entries():
    monitor = StageMonitor(interval=0.005)
    size = 150 * 2**20
    for entry in range(2):
        with monitor.stage("train"):
            if entry == 0:
                block = np.ones(size, dtype=np.uint8)
                # At least one reading has to fall between allocation and release.
                threading.Event().wait(0.05)
                del block
    with monitor.stage("export"):
        pass
    train, export = monitor.as_list()
    assert train["peak_rss_bytes"] - export["peak_rss_bytes"] > 0.8 * size
    device = {"peak_device_bytes", "peak_device_reserved_bytes"}
    assert set(train) == {"name", "seconds", "peak_rss_bytes", *device}


def test_device_peak_is_reset_for_each_stage_and_absent_without_a_device(monkeypatch):
    monitor = StageMonitor()
    with monitor.stage("encode"):
        pass
    peaks, held, resets = iter([700, 300]), iter([800, 900]), []
    monkeypatch.setattr(device_memory, "in_use", lambda: True)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda: resets.append(1))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda: next(held))
    for _ in range(2):
        with monitor.stage("train"):
            pass
    assert [stage["peak_device_bytes"] for stage in monitor.as_list()] == [None, 700]
    assert [stage["peak_device_reserved_bytes"] for stage in monitor.as_list()] == [None, 900]
    assert len(resets) == 2


def test_a_stage_that_raises_is_recorded_and_leaves_no_thread():
    monitor = StageMonitor()
    with pytest.raises(KeyError), monitor.stage("train"):
        raise KeyError("x")
    assert [stage["name"] for stage in monitor.as_list()] == ["train"]
    assert not any(thread.name == "rss-sampler" for thread in threading.enumerate())
    with monitor.stage("train"):
        pass


def test_nested_stages_are_refused():
    monitor = StageMonitor()
    with monitor.stage("train"), pytest.raises(RuntimeError, match="'validate'.*'train'"), monitor.stage("validate"):
        pass


def test_versions_name_the_package_and_its_libraries(monkeypatch):
    found = versions()
    assert list(found) == ["python", "torch", "diffusers", "peft", "accelerate", "transformers", "blockskip_hooks"]
    assert found["blockskip_hooks"] == __version__

    def missing(name: str) -> str:
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", missing)
    assert versions()["peft"] is None


def test_json_starts_with_the_schema_and_has_no_invalid_numbers(tmp_path: Path):
    path = tmp_path / "new folder" / "run_report.json"
    write_json(path, {"model": "tiny", "train": {"loss": [0.5, math.nan, math.inf]}, "schema": 1})
    text = path.read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(data) == ["schema", "model", "train"] and data["schema"] == 1
    assert data["train"]["loss"] == [0.5, None, None]
    assert '\n  "model"' in text


@pytest.mark.parametrize("failure", ["serialise", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, failure: str):
    path = tmp_path / "plan.json"
    write_json(path, {"kept": 7})
    before = path.read_bytes()
    if failure == "serialise":
        with pytest.raises(TypeError):
            write_json(path, {"kept": 8, "bad": object()})
    else:

        def full(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"kept": 8})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (640 * 2**20, "640 MiB"), (2**31, "2.00 GiB")],
)
def test_bytes_for_people(value: int | None, text: str):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.42, "0.42 s"), (59.96, "1 min 00 s"), (372, "6 min 12 s"), (3599.7, "1 h 00 min")],
)
def test_seconds_for_people(value: float | None, text: str):
    assert format_seconds(value) == text
