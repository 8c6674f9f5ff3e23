# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Whose drawing do images show? Of the base model and of LoRAs that `benchmarks/reproduce.py` left in its cells.

An image counts as the subject's if its embedding is nearer to that design than to all 32 other unseen designs of the
classes or, in the second column, to the training designs too, which a base model draws. One image on each background.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from catalogue import BACKGROUND_NAMES, PHOTO_SUBJECTS, prompt
from drawing import draw, grid, load_pipeline
from quality import SubjectFidelity
from settings import ASSETS, add_common_arguments, write_json

from blockskip_hooks.inference.subject_encoder import SubjectEncoder


BASE = "base"
COLUMNS = ("retrieved", "retrieved_among_training_designs_too", "similarity", "background_right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--cells", type=Path, default=Path("../../reproduce_cells"))
    parser.add_argument("--rows", nargs="+", default=["plain", "skip30_dynamic_refresh"])
    parser.add_argument("--subjects", nargs="+", default=["backpack", "dog", "robot", "clock", "teapot", "teddy_bear"])
    parser.add_argument("--cell_seed", type=int, default=0, help="seed of the cells to read")
    parser.add_argument("--sheet", type=Path, help="draw the rows' images to this file, each subject on its own line")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fidelity = SubjectFidelity(args, SubjectEncoder.from_pretrained(ASSETS / "subject_encoder"))
    backgrounds, results, sheet = list(BACKGROUND_NAMES), {}, []
    print("| row | " + " | ".join((*args.subjects, "mean of", *COLUMNS)) + " |")
    for row in (BASE, *args.rows):
        of_row = {}
        for subject in args.subjects:
            pipeline = load_pipeline()
            if row != BASE:
                pipeline.load_lora_weights(args.cells / f"{row}-{subject}-{args.cell_seed}")
            prompts = [prompt(PHOTO_SUBJECTS[subject][0], name, rare_token=True) for name in backgrounds]
            images = draw(pipeline, prompts, 5)
            sheet.append(images)
            of_row[subject] = fidelity.measure(images, subject, backgrounds)
        means = {name: round(float(np.mean([figures[name] for figures in of_row.values()])), 3) for name in COLUMNS}
        results[row] = {"mean": means, "subjects": of_row}
        each = [f"{figures['retrieved']:.2f}" for figures in of_row.values()]
        print("| " + " | ".join((row, *each, "", *map(str, means.values()))) + " |", flush=True)
    if args.sheet:
        grid(torch.cat(sheet), len(backgrounds)).save(args.sheet, optimize=True)
    if args.json:
        write_json(args.json, {"schema": 1, "seed": args.cell_seed, "images": len(backgrounds), "rows": results})


if __name__ == "__main__":
    main()
