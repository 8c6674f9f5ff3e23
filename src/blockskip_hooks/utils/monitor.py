"""Time and peak memory of each stage of a run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import psutil

from .device_memory import device_memory, device_peak, reset_device_peak
from .formatting import format_bytes, format_seconds


logger = logging.getLogger(__name__)

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
        reset_device_peak()
        sampler = self._sampler = _RssSampler(self._interval)
        sampler.start()
        start = self._entered = time.monotonic()
        try:
            yield
        finally:
            cost.seconds += time.monotonic() - start
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, sampler.stop())
            if (on_device := device_peak()) is not None:
                allocated, reserved = on_device
                cost.peak_device_bytes = max(cost.peak_device_bytes or 0, allocated)
                cost.peak_device_reserved_bytes = max(cost.peak_device_reserved_bytes or 0, reserved)
            self._running = self._sampler = None
            peak = cost.peak_rss_bytes if on_device is None else cost.peak_device_bytes
            logger.info("Stage %s: %s so far, peak %s.", name, format_seconds(cost.seconds), format_bytes(peak))

    def memory(self) -> tuple[int, int]:
        """Bytes in use now, and the most since the running stage was entered: the device's, else the process's."""
        if (now := device_memory()) is not None and (peak := device_peak()) is not None:
            return now[0], peak[0]
        if self._sampler is None:
            now = psutil.Process().memory_info().rss
            return now, now
        return self._sampler.current, self._sampler.peak

    def add(self, earlier: Iterable[Mapping[str, Any]]) -> None:
        """Count stages of the same run in an earlier process, as :meth:`as_list` gave them: the run has gone on."""
        for stage in earlier:
            cost = self._stages.setdefault(stage["name"], StageCost(stage["name"]))
            cost.seconds += stage["seconds"]
            cost.peak_rss_bytes = max(cost.peak_rss_bytes, stage["peak_rss_bytes"])
            for name in ("peak_device_bytes", "peak_device_reserved_bytes"):
                if stage[name] is not None:
                    setattr(cost, name, max(getattr(cost, name) or 0, stage[name]))

    def as_list(self) -> list[dict[str, Any]]:
        """Stages in the order in which they were first entered, as run_report.json stores them.

        The one that is running is among them, with its cost so far.
        """
        stages = {name: asdict(cost) for name, cost in self._stages.items()}
        if self._running is not None and self._sampler is not None:
            running = stages[self._running]
            running["seconds"] += time.monotonic() - self._entered
            running["peak_rss_bytes"] = max(running["peak_rss_bytes"], self._sampler.peak)
            for key, peak in zip(("peak_device_bytes", "peak_device_reserved_bytes"), device_peak() or ()):
                running[key] = max(running[key] or 0, peak)
        return list(stages.values())
