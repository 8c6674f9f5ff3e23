#!/usr/bin/env python
"""Do cheap searches for the blocks to skip agree with the paper's, on the embedded model?

The masking search runs on (a) fine-tuned LoRAs of several subjects, as in the paper, (b) the base model with class
prompts, and (d) as b with the encoder that needs no download.
Printed are the rank correlations of the curves with a's, the chosen pairs, and the regret of each choice: in a's own
harm, and in the fidelity of what is trained, by the cells of ``block_choice.py``.

Example:
    python benchmarks/selection_sources.py --choices choice_cells --json benchmarks/results/selection_sources.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from cells import SUBJECTS, read_cells, run_cells, train
from common import benchmark_parser, load_script, run_in_process, write_figures

from blockskip_hooks.embedded import embedded_subjects
from blockskip_hooks.evaluation.statistics import bootstrap
from blockskip_hooks.search.tables import SelectionTable, read_table


SIZES = (5, 7, 9)


def train_lora(cell: tuple[str, Path]) -> dict[str, Any]:
    """A plain LoRA of one subject."""
    subject, folder = cell
    return {"steps": train(folder, subject, 0, {"--skip_blocks": "none"})["train"]["steps"]}


def search(output: Path, *flags: str) -> SelectionTable:
    """The table of a search by the ordinary script."""
    if not (output / "selection.json").is_file():
        argv = [*flags, "--window_lengths", "--no_cache", "--output_dir", str(output)]
        run_in_process(load_script("select_blocks"), argv)
    return read_table(output / "selection.json")


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of two curves without their first value, which is 0."""
    ranks = [np.argsort(np.argsort(curve[1:])) for curve in (first, second)]
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


def harm(table: SelectionTable, pair: tuple[int, int]) -> float:
    """D[n] + D[m] of the table's curves."""
    return table.leading[pair[0]] + table.trailing[pair[1]]


def fidelity_regret(
    cells: Sequence[Mapping[str, Any]], chosen: Mapping[str, tuple[int, int]], skipped: int
) -> dict[str, Any] | None:
    """What the chosen pair loses in subject fidelity against the best pair, over subjects and seeds.

    Args:
        cells: Finished cells of ``block_choice.py``.
        chosen: The pair of each subject.
        skipped: k.
    """
    table: dict[tuple[int, int], dict[tuple[str, int], float]] = {}
    for cell in cells:
        if "," in cell["skip"]:
            n, m = map(int, cell["skip"].split(","))
            table.setdefault((n, m), {})[cell["subject"], cell["seed"]] = cell["similarity"]
    pairs = [(n, skipped - n) for n in range(skipped + 1)]
    if any(pair not in table for pair in pairs):
        return None
    shared = sorted(key for key in set.intersection(*(set(table[pair]) for pair in pairs)) if key[0] in chosen)
    best = max(pairs, key=lambda pair: mean(table[pair][key] for key in shared))
    picked = {key: table[chosen[key[0]]][key] for key in shared}
    return {
        "runs": len(shared),
        "best_pair": list(best),
        "regret": bootstrap({key: table[best][key] - value for key, value in picked.items()}),
        "above_mean_of_pairs": bootstrap(
            {key: value - mean(table[pair][key] for pair in pairs) for key, value in picked.items()}
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print and write the comparison."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=sorted(embedded_subjects()))
    parser.add_argument("--cells", default="selection_cells", help="Folder of finished LoRAs and searches.")
    parser.add_argument("--choices", help="Folder of the finished cells of block_choice.py.")
    parser.add_argument("--jobs", type=int, default=2, help="LoRAs at a time.")
    args = parser.parse_args(argv)

    folder = Path(args.cells).resolve()
    loras = {subject: folder / f"lora-{subject}" for subject in args.subjects}
    run_cells(train_lora, {path.with_suffix(".json"): (s, path) for s, path in loras.items()}, args.jobs, "LoRAs")
    prompts = [embedded_subjects()[subject]["instance_prompt"] for subject in args.subjects]
    reference = search(folder / "a", "--lora_weights", *map(str, loras.values()), "--prompts", *prompts)
    base, offline = search(folder / "b"), search(folder / "d", "--encoder", "offline")
    tables = {
        "a, LoRAs of the subjects": reference,
        "b, base model": base,
        "d, base model, encoder offline": offline,
    }
    cells = [] if args.choices is None else read_cells(sorted(Path(args.choices).glob("*.json")))
    results: dict[str, Any] = {}
    for name, table in tables.items():
        results[name] = {
            "rank_correlation_with_a": {
                end: rank_correlation(getattr(table, end), getattr(reference, end)) for end in ("leading", "trailing")
            },
            "pairs": {str(k): list(table.pairs[k]) for k in SIZES},
            "regret_in_harm_of_a": {
                str(k): round(harm(reference, table.pairs[k]) - harm(reference, reference.pairs[k]), 4) for k in SIZES
            },
            "fidelity": {
                str(k): fidelity_regret(cells, dict.fromkeys(args.subjects, table.pairs[k]), k) for k in SIZES
            },
        }
    curves = {end: list(getattr(reference, end)) for end in ("leading", "trailing")}
    summary = {"subjects": list(args.subjects), "curves_of_a": curves, "sources": results}
    print(json.dumps(summary, indent=2))
    write_figures(args.json, "selection_sources", **summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
