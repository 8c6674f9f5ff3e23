"""What a run costs: seconds and peak memory of each stage, library versions, and crash-safe JSON files."""

from __future__ import annotations

import json
import logging
import math
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from .files import replacing
from .version import __version__


logger = logging.getLogger(__name__)

SCHEMA = 1
SAMPLING_INTERVAL = 0.05


@dataclass
class StageCost:
    """Cost of one stage; the fields are those of ``stages`` in run_report.json."""

    name: str
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_device_bytes: int | None = None
    peak_device_reserved_bytes: int | None = None


class _RssSampler(threading.Thread):
    """Highest resident memory of this process while the thread runs.

    A thread, because most of a stage's memory lives inside single calls (a VAE batch, a backward pass) that return
    only after it has been freed. Spikes shorter than the interval can be missed; torch releases the GIL in its
    kernels, so a busy main thread does not starve the sampling.
    """

    def __init__(self, interval: float) -> None:
        super().__init__(name="rss-sampler", daemon=True)
        self._process = psutil.Process()
        self._interval = interval
        self._stop_requested = threading.Event()
        self.current = self.peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._stop_requested.wait(self._interval):
            self._sample()

    def stop(self) -> int:
        """End the thread and return the peak in bytes."""
        self._stop_requested.set()
        self.join()
        self._sample()
        return self.peak

    def _sample(self) -> None:
        self.current = self._process.memory_info().rss
        self.peak = max(self.peak, self.current)


class StageMonitor:
    """Measures the stages of a run in this process.

    A stage that is entered again continues: its seconds add up and its peaks are the highest of all entries. That is
    how stretches work, which alternate between precompute and train.

    Args:
        interval: Seconds between two readings of the resident memory.

    Example::

        monitor = StageMonitor()
        with monitor.stage("encode"):
            encode_prompts()
        monitor.as_list()  # [{"name": "encode", "seconds": 3.1, "peak_rss_bytes": ..., ...}]
    """

    def __init__(self, interval: float = SAMPLING_INTERVAL) -> None:
        self._interval = interval
        self._stages: dict[str, StageCost] = {}
        self._running: str | None = None
        self._entered = 0.0
        self._sampler: _RssSampler | None = None
        self.started = datetime.now(timezone.utc)
        """When the run began."""
        self.latest: str | None = None
        """The stage that was entered last."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the body of the ``with`` statement as stage ``name``; also when it raises.

        Raises:
            RuntimeError: if another stage is running, because their device peaks could not be told apart.
        """
        if self._running is not None:
            raise RuntimeError(f"Stage '{name}' starts while stage '{self._running}' is still running.")
        self._running = self.latest = name
        cost = self._stages.setdefault(name, StageCost(name))
        _reset_device_peak()
        sampler = self._sampler = _RssSampler(self._interval)
        sampler.start()
        start = self._entered = time.monotonic()
        try:
            yield
        finally:
            cost.seconds += time.monotonic() - start
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, sampler.stop())
            device_peak = _device_peak()
            if device_peak is not None:
                allocated, reserved = device_peak
                cost.peak_device_bytes = max(cost.peak_device_bytes or 0, allocated)
                cost.peak_device_reserved_bytes = max(cost.peak_device_reserved_bytes or 0, reserved)
            self._running = self._sampler = None
            peak = cost.peak_rss_bytes if device_peak is None else cost.peak_device_bytes
            logger.info("Stage %s: %s so far, peak %s.", name, format_seconds(cost.seconds), format_bytes(peak))

    def memory(self) -> tuple[int, int]:
        """Bytes in use now, and the most since the running stage was entered: the device's, else the process's."""
        if _cuda_in_use():
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        if self._sampler is None:
            now = psutil.Process().memory_info().rss
            return now, now
        return self._sampler.current, self._sampler.peak

    def as_list(self) -> list[dict[str, Any]]:
        """Stages in the order in which they were first entered, as run_report.json stores them.

        The one that is running is among them, with its cost so far.
        """
        stages = {name: asdict(cost) for name, cost in self._stages.items()}
        if self._running is not None and self._sampler is not None:
            running = stages[self._running]
            running["seconds"] += time.monotonic() - self._entered
            running["peak_rss_bytes"] = max(running["peak_rss_bytes"], self._sampler.peak)
            for key, peak in zip(("peak_device_bytes", "peak_device_reserved_bytes"), _device_peak() or ()):
                running[key] = max(running[key] or 0, peak)
        return list(stages.values())


def _cuda_in_use() -> bool:
    # is_available() alone would count a GPU that a CPU run leaves untouched, and reading its statistics would
    # create a CUDA context of several hundred MiB.
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _reset_device_peak() -> None:
    if _cuda_in_use():
        torch.cuda.reset_peak_memory_stats()


def _device_peak() -> tuple[int, int] | None:
    return (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if _cuda_in_use() else None


def device_memory() -> tuple[int, int] | None:
    """Bytes on the device that tensors take, and that torch holds for them, now; ``None`` without a device."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if _cuda_in_use() else None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries whose change can change a result; None for one not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "peft", "accelerate", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    # A source tree on PYTHONPATH has no metadata, and an editable install may carry that of an older version.
    found["blockskip_hooks"] = __version__
    return found


def write_json(path: str | Path, data: Mapping[str, Any], temporary: Path | None = None) -> None:
    """Write ``data`` as JSON with ``"schema"`` as its first key; after a failure the old file is still whole.

    Numbers that JSON does not have (NaN, infinities) become null, so that one diverged loss does not make the whole
    file unreadable for strict parsers.

    Raises:
        TypeError: if ``data`` holds something that JSON cannot express. Nothing is written then.
    """
    document = {"schema": data.get("schema", SCHEMA), **{key: data[key] for key in data if key != "schema"}}
    write_text(path, json.dumps(_finite(document), indent=2, allow_nan=False, ensure_ascii=False) + "\n", temporary)


def write_text(path: str | Path, text: str, temporary: Path | None = None) -> None:
    """Replace a text file in one step, so that a reader or a crash never meets half of it; see ``replacing``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    with replacing(path, len(data), temporary) as file:
        file.write_bytes(data)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def format_bytes(count: float | None) -> str:
    """Bytes for people, in binary units: ``1.91 GiB``, ``640 MiB``, and a dash for unknown."""
    if count is None:
        return "–"
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    index = 0
    while count >= 1024 and index < len(units) - 1:
        count /= 1024
        index += 1
    digits = 0 if index == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {units[index]}"


def format_about(seconds: float | None) -> str:
    """An estimate for people, without digits that it does not have: ``18 s``, ``6 min``, ``1 h 04 min``, a dash."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_seconds(seconds: float | None) -> str:
    """A duration for people: ``0.42 s``, ``6 min 12 s``, ``1 h 04 min``, and a dash for unknown."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
