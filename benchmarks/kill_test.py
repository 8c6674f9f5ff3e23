#!/usr/bin/env python
"""Does a run that SIGKILL ended, and that was resumed, end with the weights of one that was never killed?

Tiny FLUX and SANA pipelines, with accumulation, prior preservation, schedules, prodigy, stretches and more; for each
setting half of the runs are killed before a seeded event (a file opened for writing, synced with half of its bytes
there, renamed or deleted; a forward, a step), half after a seeded delay. A killed run is resumed, and killed again,
until it finishes. Weights and losses must be equal to the last bit, and no temporary file may be left.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, benchmark_parser, print_targets, target, write_figures


def main(argv: list[str] | None = None) -> int:
    """Kill, resume, compare; 0 if nothing was lost."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200, help="Runs to kill, over all settings.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments.")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(REPOSITORY))
    # Processes that are forked later import the harness, too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    from tests.kills import SETTINGS

    kinds = [(name, by_time) for name in SETTINGS for by_time in (False, True)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, by_time) in enumerate(kinds):
            kills = args.kills // len(kinds) + (number < args.kills % len(kinds))
            if kills == 0:
                continue
            scratch = Path(folder) / str(number)
            results.append(kill(name, by_time, kills, args.seed + number, scratch))
            row = results[-1]
            counts = f"{row['killed']} killed, {row['finished']} finished, {len(row['lost'])} lost"
            print(f"{name}, {row['moments']}: {counts} ({row['seconds']:.0f} s)", flush=True)
    lost = [line for row in results for line in row["lost"]]
    print(*lost, sep="\n", end="\n" if lost else "")
    print(f"{sum(row['killed'] for row in results)} runs killed")
    targets = [target("runs with other weights, losses or files", len(lost), 0)]
    print_targets(targets)
    settings = {"kills": args.kills, "seed": args.seed, "flags": {name: SETTINGS[name][1] for name in SETTINGS}}
    write_figures(args.json, "kill_test", settings=settings, results=results, targets=targets)
    return 0 if all(item["met"] for item in targets) else 1


def kill(name: str, by_time: bool, kills: int, seed: int, scratch: Path) -> dict:
    """Figures of one setting."""
    from tests import script
    from tests.kills import SETTINGS, KillTest
    from tests.tiny import TINY_FAMILIES

    started = time.monotonic()
    family, flags = SETTINGS[name]
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == family)
    photos = script.save_photos(scratch / "photos", [(80, 64), (64, 64), (64, 96)])
    sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    trial = KillTest(tiny.folder, photos, scratch, flags, sizes, seed=seed, by_time=by_time)
    trial.go(kills)
    return {
        "setting": name,
        "moments": "after a delay" if by_time else f"before one of {trial.events} events",
        "killed": trial.kills,
        "finished": trial.finished,
        "lost": [line.replace(str(scratch), ".") for line in trial.lost],
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    sys.exit(main())
