# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Draws a grid with a pipeline folder: every class (rows) on some backgrounds (columns), or prompts of your own."""

import argparse
from pathlib import Path

import torch
from catalogue import BACKGROUND_NAMES, CLASS_NAMES, prompt
from drawing import draw, grid, load_pipeline
from settings import ASSETS, IMAGE_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--pipeline", type=Path, default=ASSETS / "micro_flux")
    parser.add_argument("--side", type=int, default=IMAGE_SIZE)
    parser.add_argument("--prompts", nargs="+", help="instead of the classes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = BACKGROUND_NAMES * 2
    prompts = args.prompts or [
        prompt(c, names[(row + i * 3) % 10]) for row, c in enumerate(CLASS_NAMES) for i in range(args.columns)
    ]
    images = draw(
        load_pipeline(args.pipeline),
        prompts,
        args.seed,
        args.side,
        args.pipeline,
        num_inference_steps=args.steps,
        true_cfg_scale=args.guidance,
    )
    grid(images, args.columns).save(args.output)


if __name__ == "__main__":
    main()
