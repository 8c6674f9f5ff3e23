# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Builds the embedded model from the icon packages, stage by stage; finished stages are not run again."""

import argparse
import subprocess
import sys
from pathlib import Path

from settings import add_common_arguments


# Stage -> (script, arguments, share of --minutes it may train).
STAGES = {
    "data": ("data.py", [], None),
    "photos": ("photos.py", [], None),
    "vae": ("autoencoder.py", [], 0.12),
    "encode": ("latents.py", [], None),
    "transformer": ("transformer.py", ["--compile"], 0.88),
    "encoder": ("encoder.py", [], None),
    "quality": ("quality.py", [], None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=100.0, help="time for the autoencoder and the transformer")
    args = parser.parse_args()
    common = ["--icons", str(args.icons), "--work", str(args.work)]
    common += ["--seed", str(args.seed), "--threads", str(args.threads)]
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        script, arguments, share = STAGES[stage]
        mark = args.work / f"{stage}.done"
        if mark.exists():
            print(f"{stage}: done before")
            continue
        minutes = [] if share is None else ["--minutes", f"{share * args.minutes:.1f}"]
        print(f"{stage}: {script}", flush=True)
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), *common, *arguments, *minutes], check=True
        )
        mark.touch()


if __name__ == "__main__":
    main()
