#!/usr/bin/env python
"""The README's main command as a user runs it: seconds, memory and what it leaves.

Runs ``train_dreambooth_blockskip.py --skip_blocks auto``, launched as the README says, in a process of its own, with
the embedded model and photos, and reads the resident memory of it and all its children.
Pages that processes share count in each of them, so the figure is an upper bound.

Example:
    python benchmarks/embedded_run.py --json benchmarks/results/embedded_run.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import REPOSITORY, SCRIPT, benchmark_parser, print_targets, target, tree_rss, write_figures


INTERVAL = 0.1
LAUNCH = ("launch", "--quiet", "--config_file", "examples/dreambooth_blockskip/configs/one_process.yaml")


def run(flags: list[str], output_dir: Path) -> tuple[int, float, int]:
    """Run the command and return its exit code, seconds and peak resident bytes."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH]
    argv = [*launch, SCRIPT, *flags, "--output_dir", str(output_dir)]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(argv, cwd=REPOSITORY) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                peak = max(peak, tree_rss(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(INTERVAL)
        code = child.wait()
    return code, time.perf_counter() - started, peak


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if the command fails or a target is missed."""
    parser = benchmark_parser(__doc__, epilog="Further flags go to the training script.")
    args, extra = parser.parse_known_args(argv)

    flags = ["--skip_blocks", "auto", *extra]
    with tempfile.TemporaryDirectory() as folder:
        output_dir = Path(folder) / "output"
        code, seconds, peak = run(flags, output_dir)
        files = sorted(p.relative_to(output_dir).as_posix() for p in output_dir.rglob("*") if p.is_file())
        # Trackers put the machine's name into theirs.
        files = [file for file in files if not file.startswith("logs/")]
        report_file = output_dir / "run_report.json"
        report = json.loads(report_file.read_text()) if report_file.is_file() else {}
    targets = [
        target("seconds of the whole command", seconds, 600),
        target("peak resident bytes of all its processes", peak, 3 * 2**30),
    ]
    print(f"exit code {code}; {len(files)} files left beside tracker logs:", *files, sep="\n  ")
    print_targets(targets)
    results = {
        "exit_code": code,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "files": files,
        "skip": report.get("skip"),
        "stages": report.get("stages"),
        "steps": report.get("train", {}).get("steps"),
        "step_seconds_median": report.get("train", {}).get("step_seconds_median"),
    }
    measured = " ".join(["accelerate", *LAUNCH, SCRIPT, *flags])
    write_figures(args.json, "embedded_run", measured_command=measured, results=results, targets=targets)
    return 0 if code == 0 and all(item["met"] for item in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
