# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Builds the embedded model from the icon packages, stage by stage; finished stages are not run again."""

import argparse
import subprocess
import sys
from pathlib import Path

from settings import add_common_arguments


# Stage -> (script, arguments; words in braces are filled in).
STAGES = {
    "photos": ("photos.py", []),
    "vae": ("autoencoder.py", []),
    "data": ("data.py", ["--vae", "{work}/vae"]),
    "transformer": ("transformer.py", ["--compile", "--cpu_hours", "{hours}"]),
    "anneal": ("transformer.py", ["--compile", "--anneal", "--cpu_hours", "{anneal_hours}"]),
    "export": ("export.py", ["--vae", "{work}/vae"]),
    "encoder": ("encoder.py", []),
    "quality": ("quality.py", ["--encoder", "{work}/subject_encoder"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--hours", type=float, default=18.0, help="processor time of the transformer, over all cores")
    args = parser.parse_args()
    common = ["--icons", str(args.icons), "--work", str(args.work)]
    common += ["--seed", str(args.seed), "--threads", str(args.threads)]
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        script, arguments = STAGES[stage]
        mark = args.work / f"{stage}.done"
        if mark.exists():
            print(f"{stage}: done before")
            continue
        values = {"work": args.work, "hours": 0.85 * args.hours, "anneal_hours": 0.15 * args.hours}
        arguments = [argument.format_map(values) for argument in arguments]
        print(f"{stage}: {script}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *common, *arguments], check=True)
        mark.touch()


if __name__ == "__main__":
    main()
