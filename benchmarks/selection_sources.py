#!/usr/bin/env python
"""Do cheap searches for the blocks to skip agree with the paper's, on the embedded model?

The masking search runs on (a) fine-tuned LoRAs of several subjects, as in the paper, (b) the base model with class
prompts, (c) a probe LoRA of the subject itself, a short run, and (d) as b with the encoder that needs no download.
Printed are the rank correlations of the curves with a's, the chosen pairs, and the regret of each choice: in a's own
harm, and in the fidelity of what is trained, by the cells of ``block_choice.py``.

Example:
    python benchmarks/selection_sources.py --choices choice_cells --json benchmarks/results/selection_sources.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from cells import SUBJECTS, read_cells, run_cells, train
from common import command, machine

from blockskip_hooks.embedded import embedded_subjects
from blockskip_hooks.evaluation.statistics import bootstrap
from blockskip_hooks.selection_tables import SelectionTable, read_table
from blockskip_hooks.utils.files import write_json


SCRIPT = Path(__file__).parents[1] / "examples" / "dreambooth_blockskip" / "select_blocks.py"
SIZES = (5, 7, 9)
PROBE_STEPS, PROBE_SEEDS = 100, (0, 1, 2, 3)


def train_lora(cell: tuple[str, Path]) -> dict[str, Any]:
    """A plain LoRA of one subject."""
    subject, folder = cell
    return {"steps": train(folder, subject, 0, {"--skip_blocks": "none"})["train"]["steps"]}


def probe(cell: tuple[str, Path]) -> dict[str, Any]:
    """What a search measures on a LoRA of the subject that was trained for a few steps."""
    subject, folder = cell
    train(folder, subject, 0, {"--skip_blocks": "auto", "--max_train_steps": PROBE_STEPS})
    prompt, seeds = embedded_subjects()[subject]["instance_prompt"], map(str, PROBE_SEEDS)
    search(folder / "selection", "--lora_weights", str(folder), "--prompts", prompt, "--seeds", *seeds)
    return json.loads((folder / "selection" / "selection.json").read_text())


def search(output: Path, *flags: str) -> SelectionTable:
    """The table of a search by the ordinary script."""
    if not (output / "selection.json").is_file():
        specification = importlib.util.spec_from_file_location("select_blocks", SCRIPT)
        assert specification is not None and specification.loader is not None
        script = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(script)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = script.main([*flags, "--window_lengths", "--no_cache", "--output_dir", str(output)])
        if code != 0:
            raise RuntimeError(f"select_blocks.py {' '.join(flags)} ended with {code}: {said.getvalue()[-500:]}")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=sorted(embedded_subjects()))
    parser.add_argument("--cells", default="selection_cells", help="Folder of finished LoRAs and searches.")
    parser.add_argument("--choices", help="Folder of the finished cells of block_choice.py.")
    parser.add_argument("--jobs", type=int, default=2, help="LoRAs at a time.")
    parser.add_argument("--json", help="Write the comparison to this file as well.")
    args = parser.parse_args(argv)

    folder = Path(args.cells).resolve()
    loras = {subject: folder / f"lora-{subject}" for subject in args.subjects}
    probes = {subject: folder / f"probe-{subject}" for subject in args.subjects}
    run_cells(train_lora, {path.with_suffix(".json"): (s, path) for s, path in loras.items()}, args.jobs, "LoRAs")
    run_cells(probe, {path.with_suffix(".json"): (s, path) for s, path in probes.items()}, args.jobs, "Probes")
    prompts = [embedded_subjects()[subject]["instance_prompt"] for subject in args.subjects]
    reference = search(folder / "a", "--lora_weights", *map(str, loras.values()), "--prompts", *prompts)
    base, offline = search(folder / "b"), search(folder / "d", "--encoder", "offline")
    own = {subject: read_table(path.with_suffix(".json")) for subject, path in probes.items()}
    tables = {
        "a, LoRAs of the subjects": dict.fromkeys(args.subjects, reference),
        "b, base model": dict.fromkeys(args.subjects, base),
        "c, probe LoRA of the subject": own,
        "d, base model, encoder offline": dict.fromkeys(args.subjects, offline),
    }
    cells = [] if args.choices is None else read_cells(sorted(Path(args.choices).glob("*.json")))
    results: dict[str, Any] = {}
    for name, of_subject in tables.items():
        chosen = {k: {s: table.pairs[k] for s, table in of_subject.items()} for k in SIZES}
        ends = {
            end: mean(rank_correlation(getattr(t, end), getattr(reference, end)) for t in of_subject.values())
            for end in ("leading", "trailing")
        }
        results[name] = {
            "rank_correlation_with_a": {end: round(value, 3) for end, value in ends.items()},
            "pairs": {str(k): {s: list(pair) for s, pair in pairs.items()} for k, pairs in chosen.items()},
            "regret_in_harm_of_a": {
                str(k): round(
                    mean(harm(reference, pair) - harm(reference, reference.pairs[k]) for pair in p.values()), 4
                )
                for k, p in chosen.items()
            },
            "fidelity": {str(k): fidelity_regret(cells, chosen[k], k) for k in SIZES},
        }
    curves = {end: list(getattr(reference, end)) for end in ("leading", "trailing")}
    summary = {"subjects": list(args.subjects), "curves_of_a": curves, "sources": results}
    print(json.dumps(summary, indent=2))
    if args.json:
        document = {"schema": 1, "benchmark": "selection_sources", "command": command(), "machine": machine()}
        write_json(args.json, {**document, **summary})
    return 0


if __name__ == "__main__":
    sys.exit(main())
