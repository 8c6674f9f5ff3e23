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

import itertools
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from cells import SUBJECTS, evaluate, read_cells, run_cells, train
from common import benchmark_parser, write_figures

from blockskip_hooks.embedded import embedded_model, embedded_subjects
from blockskip_hooks.evaluation.statistics import bootstrap
from blockskip_hooks.search.tables import find_table, read_table
from blockskip_hooks.selection import select_blocks
from blockskip_hooks.utils.digests import folder_digest


NUM_BLOCKS = 18


def run_cell(cell: tuple[Path, str, int, str, list[str]]) -> dict[str, Any]:
    """Train and measure one cell."""
    path, subject, seed, skip, flags = cell
    lora = path.with_suffix("")
    if skip != "base":
        fixed = {} if skip == "none" or "--refresh_residuals" in flags else {"--no-refresh_residuals": True}
        train(lora, subject, seed, {"--skip_blocks": skip} | fixed | dict.fromkeys(flags, True))
    measured = evaluate(None if skip == "base" else lora, subject)
    similarities = [image["subject"] for image in measured.images]
    return {
        "subject": subject,
        "seed": seed,
        "skip": skip,
        "similarity": mean(similarities),
        "retrieved": mean(image["retrieved"] for image in measured.images),
        "similarities": similarities,
    }


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
    parser = benchmark_parser(__doc__)
    parser.add_argument("--skipped", type=int, default=9, help=f"k, of {NUM_BLOCKS} blocks.")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=sorted(embedded_subjects()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="Seeds of training.")
    parser.add_argument("--pairs", nargs="+", help="Only these pairs, like 5,4; nothing is summarised.")
    parser.add_argument("--tables", nargs="*", default=[], help="NAME=selection.json whose pair is to be compared.")
    parser.add_argument(
        "--training_flags", default="", help='Further flags of every run, like "--patch_sampling none".'
    )
    parser.add_argument("--cells", default="block_choice_cells", help="Folder of the finished cells.")
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time.")
    args = parser.parse_args(argv)

    folder = Path(args.cells).resolve()
    pairs = args.pairs or ["base", "none", *(f"{n},{args.skipped - n}" for n in range(args.skipped + 1))]
    keys = list(itertools.product(args.seeds, args.subjects, pairs))
    files = {
        path: (path, subject, seed, pair, args.training_flags.split())
        for seed, subject, pair in keys
        for path in [folder / f"{subject}-{seed}-{pair.replace(',', '_')}.json"]
    }
    run_cells(run_cell, files, args.jobs)
    if args.pairs:
        return 0
    results = read_cells(list(files))
    weights = folder_digest(embedded_model() / "transformer")
    tables = {"auto": find_table(NUM_BLOCKS, (), weights), "rule": None}
    tables |= {name: read_table(Path(file)) for name, _, file in (item.partition("=") for item in args.tables)}
    selections = {name: select_blocks(str(args.skipped), 0.5, NUM_BLOCKS, table) for name, table in tables.items()}
    picked = {name: f"{selection.leading},{selection.trailing}" for name, selection in selections.items()}
    summary = summarise(results, args.skipped, picked)
    print(json.dumps(summary, indent=2))
    write_figures(args.json, "block_choice", **summary, subjects=list(args.subjects), seeds=args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
