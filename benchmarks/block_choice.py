#!/usr/bin/env python
"""Which pair of spans to skip, by the fidelity of what is trained: every pair of one size on the embedded model.

For each subject and seed the ordinary script trains a LoRA with every pair (n, m) of k skipped blocks; images of
prompts it has not seen are compared with the subject's photos by the embedded model's encoder. So the pair that a
selection picks can be set against the mean of all pairs (a random choice), both one-sided ones and the best.

A cell that is finished is never run again: kill it and start it anew as you like. Cells run two at a time.

Example:
    python benchmarks/block_choice.py --skipped 9 --json benchmarks/results/block_choice.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import command, machine
from diffusers import FluxPipeline
from tqdm.auto import tqdm

from blockskip_hooks.embedded import embedded_model, embedded_photos, embedded_subjects
from blockskip_hooks.evaluation import embedded_gallery, nearest_subjects, subject_fidelity
from blockskip_hooks.image_encoders import load_image_encoder
from blockskip_hooks.monitor import write_json
from blockskip_hooks.residual_store import folder_digest
from blockskip_hooks.selection import select_blocks
from blockskip_hooks.selection_tables import find_table, read_table
from blockskip_hooks.statistics import bootstrap


SCRIPT = Path(__file__).parents[1] / "examples" / "dreambooth_blockskip" / "train_dreambooth_blockskip.py"
SUBJECTS = ("dog", "robot", "clock", "teapot", "backpack", "teddy_bear")
NUM_BLOCKS = 18
IMAGES_PER_PROMPT, IMAGE_STEPS, IMAGE_SEED = 2, 12, 100


def train(output: Path, subject: str, seed: int, skip: str) -> None:
    """Train one LoRA by the script, in this process.

    Raises:
        RuntimeError: if the script fails.
    """
    specification = importlib.util.spec_from_file_location("train_dreambooth_blockskip", SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    settings = {
        "--instance_data_dir": embedded_photos(subject),
        "--instance_prompt": embedded_subjects()[subject]["instance_prompt"],
        "--seed": seed,
        "--skip_blocks": skip,
        "--output_dir": output,
        "--report_to": "none",
        "--num_validation_images": 0,
        "--checkpointing_steps": 10**6,
    }
    argv = [str(item) for pair in settings.items() for item in pair]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = script.main(argv)
    if code != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {code}: {said.getvalue()[-500:]}")


def fidelity(lora: Path | None, subject: str) -> dict[str, Any]:
    """How far images with a LoRA (or without any) show the subject: similarity to its photos, share retrieved."""
    encoder = load_image_encoder("subject")
    gallery = embedded_gallery(encoder)
    pipeline = FluxPipeline.from_pretrained(embedded_model(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    prompts = embedded_subjects()[subject]["validation_prompts"]
    images = pipeline(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=2.5,
        height=64,
        width=64,
        max_sequence_length=16,
        num_inference_steps=IMAGE_STEPS,
        num_images_per_prompt=IMAGES_PER_PROMPT,
        generator=[torch.Generator().manual_seed(IMAGE_SEED + i) for i in range(len(prompts) * IMAGES_PER_PROMPT)],
    ).images
    vectors = encoder.embed(images)
    own, nearest = subject_fidelity(vectors, gallery[subject]), nearest_subjects(vectors, gallery)
    return {
        "similarity": own.mean().item(),
        "retrieved": mean(name == subject for name in nearest),
        "similarities": own.tolist(),
    }


def run_cell(cell: tuple[Path, str, int, str]) -> None:
    """Train and measure one cell, unless its file is there."""
    folder, subject, seed, skip = cell
    torch.set_num_threads(1)
    path = cell_file(folder, subject, seed, skip)
    if path.is_file():
        return
    output = path.with_suffix("")
    if skip != "base":
        train(output, subject, seed, skip)
    write_json(
        path, {"subject": subject, "seed": seed, "skip": skip, **fidelity(output if skip != "base" else None, subject)}
    )


def cell_file(folder: Path, subject: str, seed: int, skip: str) -> Path:
    return folder / f"{subject}-{seed}-{skip.replace(',', '_')}.json"


def summarise(cells: list[dict[str, Any]], skipped: int, chosen: dict[str, str]) -> dict[str, Any]:
    """Mean similarity of every pair, and paired differences between the chosen ones and the others."""
    table: dict[str, dict[tuple[str, int], float]] = {}
    for cell in cells:
        table.setdefault(cell["skip"], {})[cell["subject"], cell["seed"]] = cell["similarity"]
    pairs = [f"{n},{skipped - n}" for n in range(skipped + 1)]
    shared = sorted(set.intersection(*(set(table[pair]) for pair in pairs)))
    at_random = {key: mean(table[pair][key] for pair in pairs) for key in shared}
    best = max(pairs, key=lambda pair: mean(table[pair][key] for key in shared))
    against = {"all pairs, mean": at_random, "leading only": table[pairs[-1]], "trailing only": table[pairs[0]]}
    retrieved = {skip: round(mean(cell["retrieved"] for cell in cells if cell["skip"] == skip), 3) for skip in table}
    return {
        "skipped": skipped,
        "runs_per_pair": len(shared),
        "similarity": {
            skip: bootstrap({key: row[key] for key in shared if key in row}) for skip, row in table.items()
        },
        "retrieved": retrieved,
        "chosen": chosen,
        "difference": {
            name: {
                other: bootstrap({key: table[pair][key] - row[key] for key in shared})
                for other, row in against.items()
            }
            for name, pair in chosen.items()
        },
        "regret": {
            name: bootstrap({key: table[best][key] - table[pair][key] for key in shared})
            for name, pair in chosen.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skipped", type=int, default=9, help=f"k, of {NUM_BLOCKS} blocks.")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=sorted(embedded_subjects()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="Seeds of training.")
    parser.add_argument("--pairs", nargs="+", help="Only these pairs, like 5,4; nothing is summarised.")
    parser.add_argument("--tables", nargs="*", default=[], help="NAME=selection.json whose pair is to be compared.")
    parser.add_argument("--cells", default="block_choice_cells", help="Folder of the finished cells.")
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time.")
    parser.add_argument("--json", help="Write the summary to this file as well.")
    args = parser.parse_args(argv)

    folder = Path(args.cells).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = args.pairs or ["base", "none", *(f"{n},{args.skipped - n}" for n in range(args.skipped + 1))]
    keys = list(itertools.product(args.seeds, args.subjects, pairs))
    cells = [(folder, subject, seed, pair) for seed, subject, pair in keys]
    missing = [cell for cell in cells if not cell_file(*cell).is_file()]
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=4) as pool:
        for _ in tqdm(pool.imap_unordered(run_cell, missing), total=len(missing), desc="Cells"):
            pass
    if args.pairs:
        return 0
    results = [json.loads(cell_file(*cell).read_text()) for cell in cells]
    weights = folder_digest(embedded_model() / "transformer")
    tables = {"auto": find_table(NUM_BLOCKS, (), weights), "rule": None}
    tables |= {name: read_table(Path(file)) for name, _, file in (item.partition("=") for item in args.tables)}
    selections = {name: select_blocks(str(args.skipped), 0.5, NUM_BLOCKS, table) for name, table in tables.items()}
    picked = {name: f"{selection.leading},{selection.trailing}" for name, selection in selections.items()}
    summary = summarise(results, args.skipped, picked)
    print(json.dumps(summary, indent=2))
    if args.json:
        document = {"benchmark": "block_choice", "command": command(), "machine": machine(), **summary}
        write_json(args.json, {**document, "subjects": list(args.subjects), "seeds": args.seeds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
