"""Run a script on the stand-in: ``python -m tests.accelerator.run [--report FILE] SCRIPT [ARGS]``.

The report says for each stage what crossed between host and device and how often the host waited, and what was left on
the device when the script had ended.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="JSON file to write")
    parser.add_argument("--limit", default="", help="bytes of the device while a stage runs")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    args = parser.parse_args()

    from blockskip_hooks.cli.startup import quiet_libraries

    quiet_libraries()
    import torch

    from tests.accelerator import device

    device.activate()
    traffic = watch_stages(*args.limit.split("=")) if args.limit else watch_stages()
    script, *sys.argv[1:] = args.command
    sys.argv[0] = script
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        code = int(error.code or 0)
    gc.collect()
    left = torch.accelerator.memory_allocated()
    print(f"stand-in: {left} bytes are left; {traffic}", flush=True)
    if args.report:
        args.report.write_text(json.dumps({"left_bytes": left, "traffic": traffic}))
    return code


def watch_stages(limited: str = "", limit: str = "0") -> dict[str, Counter[str]]:
    """Count each stage's traffic from now on, and limit the device while one of them runs."""
    from blockskip_hooks.utils.monitor import StageMonitor
    from tests.accelerator.device import native

    traffic: dict[str, Counter[str]] = {}
    plain = StageMonitor.stage

    @contextlib.contextmanager
    def stage(self: StageMonitor, name: str) -> Iterator[None]:
        before = native.traffic()
        native.set_limit(int(limit) if name == limited else 0)
        try:
            with plain(self, name):
                yield
        finally:
            native.set_limit(0)
            traffic.setdefault(name, Counter()).update(Counter(native.traffic()) - Counter(before))

    StageMonitor.stage = stage  # type: ignore[method-assign]
    return traffic


if __name__ == "__main__":
    sys.exit(main())
