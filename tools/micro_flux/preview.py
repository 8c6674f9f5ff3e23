# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Draws a grid with the pipeline folder as it is: every class (rows) on some backgrounds (columns)."""

import argparse
from pathlib import Path

import torch
from catalogue import BACKGROUND_NAMES, CLASS_NAMES, prompt
from drawing import draw, grid, load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    names = BACKGROUND_NAMES * 2
    prompts = [prompt(c, names[(row + i * 3) % 10]) for row, c in enumerate(CLASS_NAMES) for i in range(args.columns)]
    images = draw(load_pipeline(), prompts, args.seed, num_inference_steps=args.steps, true_cfg_scale=args.guidance)
    grid(images, args.columns, zoom=2).save(args.output)


if __name__ == "__main__":
    main()
