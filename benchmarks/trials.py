#!/usr/bin/env python
"""Three ways that might make up for what records and patches cost, each beside the row that it varies.

- The value of the trailing residual is corrected between refreshes: ``r = r0 + M (h - h0)``, where ``h`` is what the
  span gets now, ``h0`` what it got when the record was made, and ``r0`` the recorded residual; no skipped block runs.
  ``M`` is either a factor per channel, the regression of residuals on span inputs over the stretch's own records (a
  bias drops out of a difference); or a matrix, fitted with a ridge to a few samples whose records were made twice,
  before and after a refresh. Until the first refresh it is the regression's. In one row the gradient passes it too.
- Every record is trained on twice (``--record_repeats 2``), so half of them are made.
- The last steps see whole crops at R in place of patches.

Seconds are processor time of precompute and steps, so that other work on the machine counts little. Finished cells of
``reproduce.py`` may be put beside its own: rows of the same name are the same runs.

Example:
    python benchmarks/trials.py --json benchmarks/results/trials.json
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from cells import IMAGES_PER_PROMPT, evaluate, read_cells, run_cells, train
from common import benchmark_parser, write_figures
from reproduce import BASE, FIDELITY, MEASURES, PLAIN
from reproduce import ROWS as REPRODUCED

from blockskip_hooks.data.sample_plan import Sample
from blockskip_hooks.embedded import embedded_subjects
from blockskip_hooks.evaluation.statistics import bootstrap
from blockskip_hooks.residuals.batches import Batch, SampleMaker
from blockskip_hooks.residuals.precompute import capture
from blockskip_hooks.residuals.store import Record
from blockskip_hooks.state import SkipMode
from blockskip_hooks.training.records import RecordSource


# Steps between two measurements, samples whose records are made twice, and the ridge as a share of a channel's square.
EVERY = 10
PAIRS = 10
RIDGE = 0.3

_samples_at_hand: ContextVar[list[Sample]] = ContextVar("samples_at_hand")


class TimedRecords(RecordSource):
    """A source of batches that counts processor seconds from its making to its last batch.

    Attributes:
        facts: What was found.
    """

    facts: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._since = time.process_time()

    def complete(self, batch: Batch) -> None:
        super().complete(batch)
        self.facts["processor_seconds"] = time.process_time() - self._since


class CorrectedRecords(TimedRecords):
    """A source of batches that corrects trailing residuals for what the span gets now, and measures how far they are.

    Attributes:
        fit: ``"channels"``, ``"matrix"``, or nothing: residuals stay as they were recorded.
        passes_gradient: Whether the correction is part of what is differentiated.
    """

    fit = ""
    passes_gradient = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_batch = self.maker.batch

        def batch(samples: Sequence[Sample], *args: Any, **kwargs: Any) -> Batch:
            _samples_at_hand.set(list(samples))
            return make_batch(samples, *args, **kwargs)

        self.maker.batch = batch  # type: ignore[method-assign]
        self._records_inputs, self._step = False, 0
        self._span_input = torch.empty(0)
        self._span_inputs: dict[str, torch.Tensor] = {}
        self._map: torch.Tensor | None = None
        self._twice: list[tuple[Sample, Record]] = []
        self._squares, self._products = torch.zeros(()), torch.zeros(())
        self.facts["errors"] = []
        self._model.spans.trailing[0].module.register_forward_pre_hook(self._at_span, with_kwargs=True)

    def _at_span(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        state = self._model.skip_state
        if state.mode is SkipMode.CAPTURE:
            self._span_input = hidden_states
            if self._records_inputs:
                ids = (sample.id for sample in _samples_at_hand.get())
                self._span_inputs.update(zip(ids, hidden_states.clone(), strict=True))
        elif state.mode is SkipMode.INJECT and self._map is not None:
            now = hidden_states if self.passes_gradient else hidden_states.detach()
            residual = self._corrected(state.residuals.trailing_hidden_states, now, _samples_at_hand.get())
            state.residuals = replace(state.residuals, trailing_hidden_states=residual)

    def _corrected(self, recorded: Any, now: torch.Tensor, samples: Iterable[Sample]) -> torch.Tensor:
        """Recorded residuals ``(B, tokens, dim)`` for the span input of now, of the same shape."""
        assert self._map is not None
        change = now - torch.stack([self._span_inputs[sample.id] for sample in samples])
        return recorded + (change @ self._map if self._map.dim() == 2 else change * self._map)

    def precompute(self, stretch: range, *args: Any, **kwargs: Any) -> None:
        if self._twice:
            self._fit_changes()
        self._span_inputs.clear()
        self._records_inputs = True
        super().precompute(stretch, *args, **kwargs)
        self._records_inputs = False
        assert self._store is not None
        records = {sample.id: self.maker.read_record(sample, self._store) for sample in self._samples}
        if self.fit == "matrix":
            self._twice = [(s, records[s.id]) for s in self._samples[:: max(1, len(self._samples) // PAIRS)]]
        if self.fit == "channels" or (self.fit == "matrix" and self._map is None):
            inputs = torch.cat([self._span_inputs[sample.id] for sample in self._samples])
            residuals = torch.cat([records[sample.id]["trailing_hidden_states"] for sample in self._samples])
            inputs, residuals = inputs - inputs.mean(0), residuals - residuals.mean(0)
            if self.fit == "channels":
                self._map = (inputs * residuals).sum(0) / inputs.square().sum(0)
            else:
                self._map = ridge_map(inputs.T @ inputs, inputs.T @ residuals)

    def _fit_changes(self) -> None:
        """Make the chosen records of the stretch before with the LoRA of now, and fit what changed in all so far."""
        samples, records = [list(part) for part in zip(*self._twice, strict=True)]
        batch = self.maker.batch_from_records(samples, records)
        assert batch.residuals is not None
        now = capture(self._model, self.maker, batch).trailing_hidden_states
        before = torch.stack([self._span_inputs[sample.id] for sample in samples])
        inputs = (self._span_input - before).flatten(0, 1)
        residuals = (now - batch.residuals.trailing_hidden_states).flatten(0, 1)  # type: ignore[operator]
        self._squares = self._squares + inputs.T @ inputs
        self._products = self._products + inputs.T @ residuals
        self._map = ridge_map(self._squares, self._products)

    def complete(self, batch: Batch) -> None:
        super().complete(batch)
        self._step += 1
        if self._step % EVERY == 0:
            before = time.process_time()
            self._measure(batch)
            self._since += time.process_time() - before

    @torch.no_grad()
    def _measure(self, batch: Batch) -> None:
        """Distance of residuals from those of now, as recorded and as corrected, relative to those of now."""
        assert batch.residuals is not None
        recorded = batch.residuals.trailing_hidden_states
        now = capture(self._model, self.maker, batch).trailing_hidden_states
        assert recorded is not None and now is not None
        corrected = recorded if self._map is None else self._corrected(recorded, self._span_input, batch.samples)
        errors = [((residual - now).norm() / now.norm()).item() for residual in (recorded, corrected)]
        self.facts["errors"].append([self._step, *errors])


def ridge_map(squares: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The matrix ``(dim, dim)`` that takes inputs to outputs best, from ``X^T X`` and ``X^T Y``, held near zero."""
    return torch.linalg.solve(squares + RIDGE * squares.diagonal().mean() * torch.eye(len(squares)), products)


class WholeAtTheEnd(SampleMaker):
    """Builds batches as another maker, but with whole crops at R from one sample on.

    Args:
        maker: Builds the others.
        first_whole: Number of the first sample that is whole.
    """

    def __init__(self, maker: SampleMaker, first_whole: int) -> None:
        shared = (maker.sources, maker.family, maker.embeds, maker.device, maker.dtype)
        recorded = (maker.records_modulation, maker.residual_dtype, maker.shares_text)
        super().__init__(maker.plan, *shared, *recorded)
        whole = replace(maker.plan, patch=replace(maker.plan.patch, mode="none"))
        self._first_whole, self._whole = first_whole, SampleMaker(whole, *shared, *recorded)

    def samples(self, indices: Iterable[int]) -> list[Sample]:
        plans = {index: (self._whole if index >= self._first_whole else self).plan for index in indices}
        return [plan.sample(index, kind) for kind in self.sources for index, plan in plans.items()]

    def crop(self, sample: Sample) -> torch.Tensor:
        return self._whole.crop(sample) if sample.index >= self._first_whole else super().crop(sample)

    def positions(self, sample: Sample) -> torch.Tensor:
        return self._whole.positions(sample) if sample.index >= self._first_whole else super().positions(sample)

    def shape_key(self, sample: Sample) -> tuple:
        return *super().shape_key(sample), sample.index >= self._first_whole


class WholeAtTheEndRecords(TimedRecords):
    """A source of batches whose last steps see whole crops.

    Attributes:
        share: Of the steps.
    """

    share = 0.0

    def __init__(self, run: Any, context: Any, maker: SampleMaker, *rest: Any) -> None:
        steps = rest[-1].num_steps
        self.facts["whole_steps"] = whole = round(self.share * steps)
        first = (steps - whole) * run.samples_per_step(context.accelerator.num_processes)
        super().__init__(run, context, WholeAtTheEnd(maker, first), *rest)


@dataclass(frozen=True)
class Trial:
    """One line of the table.

    Attributes:
        title: What it is.
        flags: Its flags; ``None`` for no training at all.
        varies: Name of the row that it is compared with.
        records: What its batches come from.
        settings: Attributes of these.
    """

    title: str
    flags: Mapping[str, Any] | None
    varies: str | None = None
    records: type[TimedRecords] = TimedRecords
    settings: Mapping[str, Any] = field(default_factory=dict)


def _reproduced(name: str, records: type[TimedRecords] = TimedRecords) -> Trial:
    """A row of ``reproduce.py``."""
    return Trial(REPRODUCED[name].title, REPRODUCED[name].flags, records=records)


def _whole(varied: str, share: float) -> Trial:
    """A row whose last steps are at R."""
    title = f"{REPRODUCED[varied].title}, last {share:.0%} of the steps at R"
    return Trial(title, REPRODUCED[varied].flags, varied, WholeAtTheEndRecords, {"share": share})


def _corrected(title: str, **settings: Any) -> Trial:
    """The default with corrected residuals."""
    return Trial(
        f"{REPRODUCED[DEFAULT].title}, {title}", REPRODUCED[DEFAULT].flags, DEFAULT, CorrectedRecords, settings
    )


DEFAULT, PATCHES = "skip30_dynamic_refresh", "dynamic"
REPEATS = REPRODUCED[DEFAULT].flags | {"--record_repeats": 2}  # type: ignore[operator]
ROWS: dict[str, Trial] = {
    DEFAULT: _reproduced(DEFAULT, CorrectedRecords),
    "value_matrix": _corrected("values corrected by a matrix", fit="matrix"),
    "whole25": _whole(DEFAULT, 0.25),
    "repeats2": Trial(f"{REPRODUCED[DEFAULT].title}, records trained on twice", REPEATS, DEFAULT, CorrectedRecords),
    PATCHES: _reproduced(PATCHES),
    "dynamic_whole25": _whole(PATCHES, 0.25),
    "value_channels": _corrected("values corrected by channel", fit="channels"),
    "whole15": _whole(DEFAULT, 0.15),
    "gradient_matrix": _corrected("values and gradient corrected by a matrix", fit="matrix", passes_gradient=True),
    "dynamic_whole15": _whole(PATCHES, 0.15),
    BASE: _reproduced(BASE),
    PLAIN: _reproduced(PLAIN),
}


def run_row(cell: tuple[str, str, int, int, Path]) -> dict[str, Any]:
    """Train one row on one subject with one seed, and measure its images."""
    name, subject, seed, steps, output = cell
    trial, facts = ROWS[name], dict[str, Any]()
    if trial.flags is not None:
        records = type("Tried", (trial.records,), {**trial.settings, "facts": facts})
        train(output, subject, seed, {**trial.flags, "--max_train_steps": steps}, records)
    evaluation = evaluate(None if trial.flags is None else output, subject)
    measured = evaluation.aggregate()
    result = {name: measured[measure]["mean"] for name, measure in MEASURES.items()}
    images = [values[MEASURES[FIDELITY]] for values in evaluation.images]
    return {"row": name, "subject": subject, "seed": seed, "steps": steps, **result, "images": images, **facts}


def paired(of_row: Mapping[str, Any], of_varied: Mapping[str, Any]) -> dict[str, Any]:
    """Difference in subject fidelity; where both cells know their images, with the interval of what differs in them.

    The images are made of the same prompts and noise; prompts are drawn first. Cells of ``reproduce.py`` have only
    the mean.
    """
    difference: dict[str, Any] = {"mean": round(of_row[FIDELITY] - of_varied[FIDELITY], 4)}
    if "images" in of_row and "images" in of_varied:
        pairs = enumerate(zip(of_row["images"], of_varied["images"], strict=True))
        by_prompt = {(f"{n // IMAGES_PER_PROMPT}", n % IMAGES_PER_PROMPT): a - b for n, (a, b) in pairs}
        difference["interval"] = bootstrap(by_prompt)[1:]
    return difference


def summarise(cells: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> dict[str, Any]:
    """The rows that are there, each beside the one that it varies on the subjects and seeds that both have."""
    table: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for cell in cells:
        table.setdefault(cell["row"], {})[cell["subject"], cell["seed"]] = cell
    lines = {}
    for name in (row for row in rows if row in table):
        trial, of_row = ROWS[name], table[name]
        line: dict[str, Any] = {"title": trial.title, "varies": trial.varies, "cells": len(of_row)}
        line |= {name: round(mean(cell[name] for cell in of_row.values()), 4) for name in (FIDELITY, "retrieved")}
        if set(of_row) <= set(table.get(BASE, ())) & set(table.get(PLAIN, ())):
            gains = {
                row: mean(table[row][k][FIDELITY] - table[BASE][k][FIDELITY] for k in of_row) for row in (name, PLAIN)
            }
            line["gain"] = round(gains[name] / gains[PLAIN], 4)
        varied = table.get(trial.varies or "", {})
        if shared := sorted(set(of_row) & set(varied)):
            line["to_varied"] = {f"{s}, seed {n}": paired(of_row[s, n], varied[s, n]) for s, n in shared}
            pairs = [(of_row[key], varied[key]) for key in shared]
            timed = [pair for pair in pairs if all("processor_seconds" in cell for cell in pair)]
            seconds = [row["processor_seconds"] / other["processor_seconds"] for row, other in timed]
            line |= {"seconds_to_varied": round(median(seconds), 3)} if seconds else {}
        if errors := [error for cell in of_row.values() for error in cell.get("errors", [])]:
            line["value_error"] = {
                kind: round(mean(error[place] for error in errors), 4)
                for place, kind in ((1, "recorded"), (2, "corrected"))
            }
        lines[name] = line
    return lines


def markdown(lines: Mapping[str, Any]) -> str:
    """The table for people."""
    text = [
        "| row | subject fidelity | minus the row that it varies, by subject | gain of plain LoRA's | retrieved "
        "| processor seconds / the varied row's | value error recorded, corrected |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines.values():
        differences = []
        for where, found in line.get("to_varied", {}).items():
            interval = " ({:+.3f} to {:+.3f})".format(*found["interval"]) if "interval" in found else ""
            differences.append(f"{where}: {found['mean']:+.3f}{interval}")
        gain = f"{line['gain']:.0%}" if "gain" in line else "-"
        seconds = f"{line['seconds_to_varied']:.2f}" if "seconds_to_varied" in line else "-"
        errors = ", ".join(f"{error:.3f}" for error in line.get("value_error", {}).values()) or "-"
        text.append(
            f"| {line['title']} | {line[FIDELITY]:.3f} | {'; '.join(differences) or '-'} | {gain} "
            f"| {line['retrieved']:.2f} | {seconds} | {errors} |"
        )
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="Rows of the table.")
    parser.add_argument("--subjects", nargs="+", default=["backpack", "dog"], choices=sorted(embedded_subjects()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of training.")
    parser.add_argument("--steps", type=int, default=200, help="Steps of each run.")
    parser.add_argument("--cells", default="trials_cells", help="Folder of the finished cells.")
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time.")
    parser.add_argument("--only_read", action="store_true", help="Train nothing; show what is finished.")
    args = parser.parse_args(argv)

    folder = Path(args.cells).resolve()
    # Row by row, so that what is compared is soon there.
    files = {
        folder / f"{row}-{subject}-{seed}.json": (row, subject, seed, args.steps, folder / f"{row}-{subject}-{seed}")
        for row, seed, subject in itertools.product(args.rows, args.seeds, args.subjects)
    }
    if not args.only_read:
        run_cells(run_row, files, args.jobs)
    cells = read_cells(list(files))
    lines = summarise(cells, args.rows)
    print(markdown(lines))
    settings = {"subjects": args.subjects, "seeds": args.seeds, "steps": args.steps}
    write_figures(args.json, "trials", **settings, results=lines, cells=cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
