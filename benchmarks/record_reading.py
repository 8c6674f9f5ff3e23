#!/usr/bin/env python
"""What does reading a step's record cost: mapped, with its checksum, and while the step before computes?

Records have the size of FLUX.1-dev's at 512 px in bf16 with both spans skipped: 1,024 image and 512 text tokens of
width 3,072. They are dropped from the page cache before every pass, so they come from the disk. The step that they are
read for is a matrix product of about ``--step_seconds`` on one thread less than there are.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import torch
from common import benchmark_parser, print_targets, target, write_figures

from blockskip_hooks.residuals import store as residual_store
from blockskip_hooks.residuals.loader import read_ahead
from blockskip_hooks.residuals.store import Record, ResidualStore
from blockskip_hooks.utils.formatting import format_bytes


def main(argv: list[str] | None = None) -> int:
    """Measure; 0 if reading hides behind the step."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--records", type=int, default=24, help="Records, one to a shard.")
    parser.add_argument("--step_seconds", type=float, default=0.2, help="What a step computes, about.")
    parser.add_argument("--width", type=int, default=3072, help="Width of the hidden states.")
    args = parser.parse_args(argv)
    torch.set_num_threads(max((os.cpu_count() or 2) - 1, 1))
    with tempfile.TemporaryDirectory() as folder:
        store = ResidualStore(Path(folder) / "records", {})
        generator = torch.Generator().manual_seed(0)
        for number in range(args.records):
            shapes = {"leading": (1536, args.width), "trailing": (1024, args.width), "latents": (16, 64, 64)}
            record = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in shapes.items()}
            store.write({str(number): record})
        bytes_each = store.num_bytes // args.records
        step = matrix_step(args.step_seconds)
        directory = store.directory
        del store
        checked = median(pass_over(directory, lambda: None))
        plain = median(pass_over(directory, lambda: None, checked=False))
        alone = median(timed(step) for _ in range(args.records))
        in_turn = median(pass_over(directory, step))
        ahead = median(pass_over(directory, step, read_ahead))
    results = {
        "record_bytes": bytes_each,
        "read_seconds": plain,
        "read_and_check_seconds": checked,
        "step_seconds": alone,
        "step_with_reading_in_turn_seconds": in_turn,
        "step_with_reading_ahead_seconds": ahead,
    }
    print(f"record {format_bytes(bytes_each)}: read {plain * 1e3:.1f} ms, read and checked {checked * 1e3:.1f} ms")
    print(f"step {alone * 1e3:.1f} ms, with reading in turn {in_turn * 1e3:.1f} ms, ahead {ahead * 1e3:.1f} ms")
    targets = [target("step with reading ahead / step that reads nothing", ahead / alone, 1.1)]
    print_targets(targets)
    settings = {"records": args.records, "step_seconds": args.step_seconds, "width": args.width}
    write_figures(args.json, "record_reading", settings=settings, results=results, targets=targets)
    return 0 if all(item["met"] for item in targets) else 1


def records(store: ResidualStore) -> Iterator[Record]:
    """Every record, copied out of its mapping as a batch is."""
    for number in range(len(store)):
        yield {name: tensor.clone() for name, tensor in store.read(str(number)).items()}


def matrix_step(seconds: float) -> Callable[[], object]:
    """Something to compute for so long."""
    matrix = torch.randn(1024, 1024)
    matrix @ matrix
    repeats = max(round(seconds / median(timed(lambda: matrix @ matrix) for _ in range(5))), 1)
    return lambda: [matrix @ matrix for _ in range(repeats)]


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def pass_over(
    directory: Path,
    step: Callable[[], object],
    wrapped: Callable[[Iterable[Record]], Iterable[Record]] = iter,
    checked: bool = True,
) -> list[float]:
    """Seconds of each step with the record that it waits for, the first left out."""
    # What is mapped stays in the page cache, so every pass maps anew.
    store = ResidualStore(directory, {})
    for path in directory.glob("records-*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    checksum = residual_store.checksum
    if not checked:
        expected = {int(key): value for key, (_, _, value) in store._records.items()}
        numbers = iter(sorted(expected))
        residual_store.checksum = lambda record: expected[next(numbers)]
    seconds, started = [], time.perf_counter()
    for _ in wrapped(records(store)):
        step()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    residual_store.checksum = checksum
    return seconds[1:]


if __name__ == "__main__":
    sys.exit(main())
