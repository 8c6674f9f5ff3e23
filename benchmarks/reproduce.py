#!/usr/bin/env python
"""The paper's ablations on the embedded model: every row trained by the ordinary script in as many steps.

Subject fidelity is the similarity to the subject's photos by the embedded model's encoder, on prompts that training
has not seen. What the unpersonalised model reaches is 0 % of the gain, what plain LoRA reaches 100 %. Memory is that
of the same setting on FLUX.1-dev, simulated. A finished cell is never run again: kill it and start it anew.

Example:
    python benchmarks/reproduce.py --json benchmarks/results/reproduce.json --figure docs/images/reproduce.png
    python benchmarks/reproduce.py --quick
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

from cells import SUBJECTS, evaluate, read_cells, run_cells, train
from common import benchmark_parser, write_figures

from blockskip_hooks import DiTBlockSkipTransformer, lora_targets
from blockskip_hooks.blocks import modulation_layers
from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.embedded import embedded_subjects
from blockskip_hooks.evaluation.statistics import bootstrap
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.planning.presets import preset_facts, preset_family
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run


NUM_BLOCKS = 18
BASE, PLAIN = "base", "plain"
FIDELITY = "subject_fidelity"
# Names in the table, and those of the evaluation.
MEASURES = {
    FIDELITY: "subject",
    **{name: name for name in ("retrieved", "background_right", "diversity")},
}
AT_R: dict[str, Any] = {"--patch_sampling": "none"}
FLUX_RESOLUTION = 512
FLUX_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: What it is.
        flags: Its flags; ``None`` for no training at all.
        flux: Leading and trailing blocks of the same setting on FLUX.1-dev.
        patches: Its patch sampling there.
        only_middle: Whether LoRA goes into the kept blocks of ``flux`` but nothing is skipped.
    """

    title: str
    flags: dict[str, Any] | None
    flux: tuple[int, int] = (0, 0)
    patches: str = "none"
    only_middle: bool = False


FLUX_30, FLUX_40, FLUX_50 = (7, 10), (14, 9), (19, 9)
# 30, 40 and 50 % as --skip_blocks auto divides them on this model.
THIRTY, FORTY, FIFTY = (0, 5), (0, 7), (0, 9)
MIDDLE = {"--lora_blocks": ",".join(map(str, range(FIFTY[0], NUM_BLOCKS - FIFTY[1])))}
REFRESH, FIXED = {"--refresh_residuals": True}, {"--no-refresh_residuals": True}
NONE = {"--residuals": "none"}
FASTER = {"--learning_rate": 0.005}
LARGE = {"--patch_sampling": "dynamic", "--min_patch_size": 96}
# Patches have the positions of the photo on this model, by default; the paper's have their own.
OWN = {"--patch_positions": "patch"}


def _spans(pair: tuple[int, int]) -> dict[str, Any]:
    return {"--skip_blocks": f"{pair[0]},{pair[1]}"}


def _steps(count: int) -> dict[str, Any]:
    return {"--max_train_steps": count}


def _changed(row: Row, title: str, flags: Mapping[str, Any]) -> Row:
    """A row with further flags."""
    assert row.flags is not None
    return replace(row, title=f"{row.title}, {title}", flags={**row.flags, **flags})


def _rows_of(name: str, title: str, pair: tuple[int, int], flux: tuple[int, int]) -> dict[str, Row]:
    """One pair of spans, at R and with dynamic patches, with and without refreshed residuals."""
    spans = _spans(pair)
    return {
        name: Row(f"{title} at R", spans | AT_R | FIXED, flux),
        f"{name}_refresh": Row(f"{title} at R, refreshed", spans | AT_R | REFRESH, flux),
        f"{name}_dynamic": Row(f"{title}, dynamic patches", spans | FIXED, flux, "dynamic"),
        f"{name}_dynamic_refresh": Row(f"{title}, dynamic patches, refreshed", spans | REFRESH, flux, "dynamic"),
        f"{name}_none": Row(f"{title} at R, no residuals", spans | AT_R | NONE, flux),
    }


_PLAIN = Row("plain LoRA at R", {"--skip_blocks": "none"})
_DYNAMIC = Row("LoRA, dynamic patches", {"--patch_sampling": "dynamic"}, patches="dynamic")
_SIZES = {
    mode: Row(f"LoRA, {title}", {"--patch_sampling": mode}, patches=mode)
    for mode, title in (
        ("resize", "plain resize"),
        ("random", "random patch size"),
        ("high_to_low", "high-to-low patches"),
    )
}
_FIFTY = _rows_of("skip50", "50 % skipped", FIFTY, FLUX_50)
_FORTY = _rows_of("skip40", "40 % skipped", FORTY, FLUX_40)
_THIRTY = _rows_of("skip30", "30 % skipped", THIRTY, FLUX_30)
_RULE = _rows_of("rule50", "50 % skipped by the rule", (6, 3), FLUX_50)
_LARGER = {
    "": Row("LoRA, patches from 3/4 of R", LARGE, patches="large"),
    **{
        title: Row(f"{title}, patches from 3/4 of R, refreshed", _spans(pair) | LARGE | REFRESH, flux, "large")
        for title, pair, flux in (("30 % skipped", THIRTY, FLUX_30), ("50 % skipped", FIFTY, FLUX_50))
    },
}
ROWS: dict[str, Row] = {
    BASE: Row("not personalised", None),
    PLAIN: _PLAIN,
    "dynamic": _DYNAMIC,
    **{name: _FIFTY[name] for name in ("skip50", "skip50_refresh", "skip50_dynamic", "skip50_dynamic_refresh")},
    **{name: _THIRTY[name] for name in ("skip30", "skip30_refresh", "skip30_dynamic", "skip30_dynamic_refresh")},
    **{name: _FIFTY[name] for name in ("skip50_none",)},
    **{name: _RULE[name] for name in ("rule50", "rule50_refresh", "rule50_none")},
    "leading50": Row("first 50 % skipped at R", {"--skip_blocks": "9,0"} | AT_R, (28, 0)),
    "middle50": Row("LoRA in the kept blocks of 50 %, nothing skipped", MIDDLE, FLUX_50, "none", True),
    "resize": _SIZES["resize"],
    "random": _SIZES["random"],
    "high_to_low": _SIZES["high_to_low"],
    **{
        f"{name}_own": _changed(row, "positions of the patch", OWN)
        for name, row in (
            ("dynamic", _DYNAMIC),
            ("skip30_dynamic_refresh", _THIRTY["skip30_dynamic_refresh"]),
            ("skip50_dynamic_refresh", _FIFTY["skip50_dynamic_refresh"]),
            *_SIZES.items(),
        )
    },
    **_FORTY,
    "skip30_none": _THIRTY["skip30_none"],
    **{
        f"skip50_repeats{times}": _changed(
            _FIFTY["skip50_refresh"], f"records trained on {times} times", {"--record_repeats": times}
        )
        for times in (2, 4)
    },
    # Patches that are less small, as a share of R.
    "dynamic96": _LARGER[""],
    "skip30_dynamic96_refresh": _LARGER["30 % skipped"],
    "skip50_dynamic96_refresh": _LARGER["50 % skipped"],
    # What might make up for the patches: as many pixels per step, more steps, a higher learning rate.
    "dynamic_batch20": _changed(_DYNAMIC, "batches of 20 for 5", {"--train_batch_size": 20}),
    "dynamic_400": _changed(_DYNAMIC, "400 steps", _steps(400)),
    "dynamic_rate": _changed(_DYNAMIC, "learning rate 0.005", FASTER),
    "plain_rate": _changed(_PLAIN, "learning rate 0.005", FASTER),
    "dynamic96_rate": _changed(_LARGER[""], "learning rate 0.005", FASTER),
    "skip30_dynamic96_rate": _changed(_LARGER["30 % skipped"], "learning rate 0.005", FASTER),
    "skip50_dynamic96_rate": _changed(_LARGER["50 % skipped"], "learning rate 0.005", FASTER),
    # What skipping reaches in about the time of 50 and of 200 steps of plain LoRA: its records serve four times.
    "plain_50": _changed(_PLAIN, "50 steps", _steps(50)),
    **{
        f"skip50_repeats4_{steps}": _changed(
            _FIFTY["skip50_refresh"],
            f"records trained on 4 times, {steps} steps",
            {"--record_repeats": 4} | _steps(steps),
        )
        for steps in (85, 340)
    },
}


def run_row(cell: tuple[str, str, int, Path]) -> dict[str, Any]:
    """Train one row on one subject with one seed, and measure its images."""
    name, subject, seed, output = cell
    flags = ROWS[name].flags
    report = None if flags is None else train(output, subject, seed, flags)
    measured = evaluate(None if report is None else output, subject).aggregate()
    result: dict[str, Any] = {"row": name, "subject": subject, "seed": seed}
    result |= {name: measured[measure]["mean"] for name, measure in MEASURES.items()}
    if report is not None:
        stages = {stage["name"]: stage["seconds"] for stage in report["stages"]}
        result |= {
            "leading": report["skip"]["leading"],
            "trailing": report["skip"]["trailing"],
            "step_seconds": report["train"]["step_seconds_median"],
            "wall_seconds": stages["train"] + stages.get("precompute", 0.0),
            "loss": mean(report["train"]["loss"][-50:]),
        }
    return result


@cache
def flux_memory(flux: tuple[int, int], patches: str, only_middle: bool) -> float:
    """Peak of a training step of the setting on FLUX.1-dev in GiB, simulated: bf16, batch 1, rank 16."""
    family, transformer = preset_family("flux.1-dev"), preset_facts("flux.1-dev")["transformer"]
    spans = BlockSkipConfig(leading=flux[0], trailing=flux[1])
    model = DiTBlockSkipTransformer(empty_model(transformer), spans)
    targets = lora_targets(model, FLUX_LAYERS, family.text_stream_layers)
    config = BlockSkipConfig() if only_middle else spans
    size = {"none": FLUX_RESOLUTION, "large": FLUX_RESOLUTION * 3 // 4}.get(patches, FLUX_RESOLUTION // 2)
    request = PlanRequest(
        family=family,
        transformer_config=transformer,
        config=config,
        patch=PatchSamplingConfig(
            mode="none" if patches == "none" else "dynamic",
            min_size=size,
            max_size=FLUX_RESOLUTION,
            multiple=family.latent_token_size,
        ),
        rank=16,
        lora_targets=targets,
        recorded_layers=modulation_layers(model.spans, family.modulation_layers) if config.num_skipped else (),
        cache_latents=True,
        num_samples=1,
    )
    train_stage = next(stage for stage in plan_run(request)["stages"] if stage["name"] == "train")
    return round(train_stage["peak_device_bytes"] / 2**30, 2)


def summarise(cells: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> dict[str, Any]:
    """The table: each row over its subjects and seeds, beside plain LoRA and the base model on the same ones.

    Args:
        cells: Finished cells.
        rows: Names of the rows to show.
    """
    table: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for cell in cells:
        table.setdefault(cell["row"], {})[cell["subject"], cell["seed"]] = cell
    base, plain = table[BASE], table[PLAIN]
    subjects = sorted({subject for subject, _ in base.keys() & plain.keys()})
    lines: dict[str, dict[str, Any]] = {}
    for name in (row for row in rows if row in table):
        # Seeds that every subject has: the bootstrap wants equally many of each.
        have = base.keys() & plain.keys() & table[name].keys()
        of_all = [
            seed for seed in sorted({s for _, s in have}) if all((subject, seed) in have for subject in subjects)
        ]
        keys = [(subject, seed) for subject in subjects for seed in of_all]
        if not keys:
            continue
        of_row = {key: table[name][key] for key in keys}
        line: dict[str, Any] = {"title": ROWS[name].title, "seeds": of_all}
        for measure in MEASURES:
            line[measure] = bootstrap({key: cell[measure] for key, cell in of_row.items()})
            line[f"{measure}_to_plain"] = bootstrap(
                {key: cell[measure] - plain[key][measure] for key, cell in of_row.items()}
            )
        gains = {key: [cell[FIDELITY] - base[key][FIDELITY] for cell in (of_row[key], plain[key])] for key in keys}
        line["gain"] = round(_share(gains.values()), 4)
        line["gain_by_subject"] = {
            subject: round(_share(gains[subject, seed] for seed in of_all), 4) for subject in subjects
        }
        if ROWS[name].flags is not None:
            for figure in ("step_seconds", "wall_seconds"):
                ratio = median(of_row[key][figure] / plain[key][figure] for key in keys)
                line[f"{figure}_to_plain"] = round(ratio, 3)
            spans = {(cell["leading"], cell["trailing"]) for cell in of_row.values()}
            line["spans"] = [list(pair) for pair in sorted(spans)]
            line["loss"] = round(mean(cell["loss"] for cell in of_row.values()), 4)
            row = ROWS[name]
            line["flux_train_gib_simulated"] = flux_memory(row.flux, row.patches, row.only_middle)
            line["flux_spans"] = list(row.flux)
        lines[name] = line
    return {
        "subjects": subjects,
        "seeds": sorted({s for line in lines.values() for s in line["seeds"]}),
        "rows": lines,
    }


def _share(gains: Iterable[Sequence[float]]) -> float:
    """What a row gains, as a share of what plain LoRA gains, summed over runs."""
    of_row, of_plain = zip(*gains, strict=True)
    return sum(of_row) / sum(of_plain)


def markdown(summary: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        "| row | first, last skipped | runs | subject fidelity | minus plain LoRA's | gain of plain LoRA's "
        "| background right | diversity | step, wall / plain | FLUX.1-dev train, simulated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in summary["rows"].values():
        low, high = line[FIDELITY][1:]
        difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(*line[f"{FIDELITY}_to_plain"])
        spans = "; ".join(f"{n}, {m}" for n, m in line.get("spans", [])) or "-"
        runs = len(summary["subjects"]) * len(line["seeds"])
        times = "-"
        if "step_seconds_to_plain" in line:
            times = f"{line['step_seconds_to_plain']:.2f}, {line['wall_seconds_to_plain']:.2f}"
        memory = f"{line['flux_train_gib_simulated']:.1f} GiB" if "flux_train_gib_simulated" in line else "-"
        lines.append(
            f"| {line['title']} | {spans} | {runs} | {line[FIDELITY][0]:.3f} ({low:.3f} to {high:.3f}) | {difference} "
            f"| {line['gain']:.0%} | {line['background_right'][0]:.2f} "
            f"| {line['diversity'][0]:.3f} | {times} | {memory} |"
        )
    return "\n".join(lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Subject fidelity of every row with its interval, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(summary["rows"].values())[::-1]
    means = [line[FIDELITY][0] for line in rows]
    below = [line[FIDELITY][0] - line[FIDELITY][1] for line in rows]
    above = [line[FIDELITY][2] - line[FIDELITY][0] for line in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
    axes.barh(range(len(rows)), means, xerr=[below, above], color="#7a9cc6", ecolor="#444444", capsize=2)
    axes.set_yticks(range(len(rows)), [line["title"] for line in rows])
    seeds = sorted({len(line["seeds"]) for line in rows})
    runs = f"{len(summary['subjects'])} subjects x {' or '.join(map(str, seeds))} seeds"
    axes.set_xlabel(f"subject fidelity on the embedded model\n{runs}, 95 % interval")
    axes.axvline(summary["rows"][PLAIN][FIDELITY][0], color="#444444", linewidth=0.8, linestyle="--")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="Rows of the table.")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=sorted(embedded_subjects()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="Seeds of training.")
    parser.add_argument("--quick", action="store_true", help="One subject and one seed.")
    parser.add_argument("--cells", default="reproduce_cells", help="Folder of the finished cells.")
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time.")
    parser.add_argument("--only_read", action="store_true", help="Train nothing; show what is finished.")
    parser.add_argument("--figure", type=Path, help="Draw subject fidelity to this file as well.")
    args = parser.parse_args(argv)

    rows = list(dict.fromkeys([BASE, PLAIN, *args.rows]))
    subjects, seeds = (args.subjects[:1], args.seeds[:1]) if args.quick else (args.subjects, args.seeds)
    folder = Path(args.cells).resolve()
    keys = list(itertools.product(seeds, subjects, rows))
    files = {
        folder / f"{row}-{subject}-{seed}.json": (row, subject, seed, folder / f"{row}-{subject}-{seed}")
        for seed, subject, row in keys
    }
    if not args.only_read:
        run_cells(run_row, files, args.jobs)
    cells = read_cells(list(files))
    summary = summarise(cells, rows)
    print(markdown(summary))
    if hidden := [row for row in rows if row not in summary["rows"]]:
        print(f"Not shown, as no seed of theirs is finished for all subjects: {', '.join(hidden)}", file=sys.stderr)
    write_figures(args.json, "reproduce", **summary, cells=cells)
    if args.figure:
        draw(summary, args.figure)
    print(json.dumps({key: summary[key] for key in ("subjects", "seeds")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
