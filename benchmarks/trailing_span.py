#!/usr/bin/env python
"""How wrong a frozen trailing span is during training, in its value and in its gradient, and what corrections buy.

Training on records takes the trailing span's residual from an earlier LoRA, and its gradient for the identity's.
Every ``--every`` steps the batch at hand is run through the whole model: how far is the recorded residual from the one
of now, and how close is the gradient that reaches the kept blocks to the true one (cosine)? Arms:

- fixed: records of the base model, as in the paper
- refreshed: records made anew for every stretch, with the LoRA so far (``--refresh_residuals``)
- recorded: refreshed, and the gradient corrected by what the span made of the gradient when the record was made: the
  rank-one estimate ``J^T g = g + c (g0.g)/(g0.g0)`` of each sample, with ``c = J^T g0 - g0``
- diagonal, linear: refreshed, and the gradient corrected by a factor per channel, or by a matrix of channels, fitted
  to the first samples of the stretch for each quarter of the timesteps

The last three run the trailing span once more with gradients for each record, or for a few of a stretch. Here this is
done on the spot, because it is a study: times are not comparable.

Example:
    python benchmarks/trailing_span.py --json benchmarks/results/trailing_span.json
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cells import SUBJECTS, evaluate, read_cells, run_cells, train
from common import benchmark_parser, write_figures

from blockskip_hooks.embedded import embedded_subjects
from blockskip_hooks.losses import flow_matching_loss
from blockskip_hooks.residuals.batches import Batch
from blockskip_hooks.residuals.precompute import capture
from blockskip_hooks.state import SkipMode
from blockskip_hooks.training.records import RecordSource


ARMS = ("fixed", "refreshed", "recorded", "diagonal", "linear")
QUARTERS = 4
FITTED_STEPS = 8
# Ridge of the fitted matrix, as a share of the mean square of a channel.
RIDGE = 0.3

Correction = Callable[[torch.Tensor], torch.Tensor]


class StudiedRecords(RecordSource):
    """A source of batches that measures the trailing span, and corrects its gradient by one of the arms.

    Attributes:
        arm: Name of the arm.
        every: Steps between two measurements.
        measured: What was measured.
    """

    arm = "fixed"
    every = 10
    measured: list[dict[str, float]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        span = self._model.spans.trailing
        self._span_input = self._span_output = torch.empty(0)
        self._correct: Correction | None = None
        self._step = 0
        span[0].module.register_forward_pre_hook(self._note_input, with_kwargs=True)
        span[-1].module.register_forward_hook(self._note_output)
        self._fitted_for = -1
        self._fits: dict[int, torch.Tensor] = {}

    def _note_input(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._span_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self._correct is not None and self._model.skip_state.mode is SkipMode.INJECT:
            self._span_input.register_hook(self._correct)
            self._correct = None

    def _note_output(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._span_output = output[1] if isinstance(output, tuple) else output

    def _gradients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the whole model's loss by the span's input and output, ``(B, tokens, dim)``."""
        family, model = self._run.family, self._model
        inputs = family.transformer_inputs(model.config, batch.noisy_latents, batch.timesteps, batch.embeds)
        model.skip_state.mode = SkipMode.RUN
        prediction = model.transformer(**inputs, return_dict=False)[0]
        prediction, target = batch.loss_terms(family, family.prediction_to_latents(prediction, batch.latents))
        loss = flow_matching_loss(prediction, target, batch.sigmas, self._run.settings.weighting_scheme).sum()
        at_input, at_output = torch.autograd.grad(loss, [self._span_input, self._span_output])
        return at_input, at_output

    def _correction(self, batch: Batch) -> Correction:
        if self.arm == "recorded":
            with self._adapters_of_stretch():
                at_input, at_output = self._gradients(batch)
            change, squares = at_input - at_output, at_output.square().sum((1, 2), keepdim=True)
            return lambda g: g + (g * at_output).sum((1, 2), keepdim=True) / squares.clamp_min(1e-30) * change
        if self.arm in ("diagonal", "linear"):
            self._fit()
            fits = [self._fits.get(quarter) for quarter in self._quarters(batch)]
            return lambda g: torch.stack(
                [row if fit is None else row + self._applied(fit, row) for row, fit in zip(g, fits, strict=True)]
            )
        return lambda g: g

    def _applied(self, fit: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * fit if self.arm == "diagonal" else gradient @ fit

    def _quarters(self, batch: Batch) -> list[int]:
        return (batch.sigmas.flatten() * QUARTERS).long().clamp(max=QUARTERS - 1).tolist()

    def _fit(self) -> None:
        """Fit the stretch's corrections to the gradients of its first steps' samples."""
        assert self._store is not None
        stretch = self.stretches.of(self._step)
        if self._fitted_for == stretch.start:
            return
        self._fitted_for = stretch.start
        found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        with self._adapters_of_stretch():
            for step in list(stretch)[:FITTED_STEPS]:
                samples = self.maker.samples(self._indices([step]))
                records = [self.maker.read_record(sample, self._store) for sample in samples]
                batch = self.maker.batch_from_records(samples, records)
                at_input, at_output = self._gradients(batch)
                for row, quarter in enumerate(self._quarters(batch)):
                    found.setdefault(quarter, []).append((at_output[row], at_input[row] - at_output[row]))
        for quarter, pairs in found.items():
            gradients, changes = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            if self.arm == "diagonal":
                self._fits[quarter] = (gradients * changes).sum(0) / gradients.square().sum(0).clamp_min(1e-30)
            else:
                squares = gradients.T @ gradients
                squares += RIDGE * squares.diagonal().mean() * torch.eye(squares.shape[0])
                self._fits[quarter] = torch.linalg.solve(squares, gradients.T @ changes)

    def complete(self, batch: Batch) -> None:
        super().complete(batch)
        correct = self._correction(batch)
        if self._step % self.every == self.every - 1:
            self._measure(batch, correct)
        # The next forward is that of the step.
        self._correct = correct
        self._step += 1

    def _measure(self, batch: Batch, correct: Correction) -> None:
        assert batch.residuals is not None and batch.residuals.trailing_hidden_states is not None
        now = capture(self._model, self.maker, batch).trailing_hidden_states
        assert now is not None
        error = (batch.residuals.trailing_hidden_states - now).norm() / now.norm()
        true, at_output = self._gradients(batch)

        def cosine(gradient: torch.Tensor) -> float:
            return torch.nn.functional.cosine_similarity(gradient.flatten(1), true.flatten(1)).mean().item()

        self.measured.append(
            {
                "step": self._step + 1,
                "value_error": error.item(),
                "identity": cosine(at_output),
                "corrected": cosine(correct(at_output)),
            }
        )


def run_cell(cell: tuple[str, str, int, str, int, Path]) -> dict[str, Any]:
    """Train one arm on one subject, and measure."""
    arm, subject, seed, skip, every, output = cell
    measured: list[dict[str, float]] = []
    records = type("Studied", (StudiedRecords,), {"arm": arm, "every": every, "measured": measured})
    refresh = "--no-refresh_residuals" if arm == "fixed" else "--refresh_residuals"
    flags: dict[str, Any] = {"--skip_blocks": skip, "--patch_sampling": "none", refresh: True}
    report = train(output, subject, seed, flags, records)
    fidelity = evaluate(output, subject).aggregate()["subject"]["mean"]
    loss = mean(report["train"]["loss"][-50:])
    return {"arm": arm, "subject": subject, "seed": seed, "fidelity": fidelity, "loss": loss, "measured": measured}


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over subjects and seeds: fidelity, and error and cosine by step."""
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        of_arm = [cell for cell in cells if cell["arm"] == arm]
        by_step = zip(*(cell["measured"] for cell in of_arm), strict=True)
        summary[arm] = {
            "runs": len(of_arm),
            "fidelity": round(mean(cell["fidelity"] for cell in of_arm), 4),
            "loss": round(mean(cell["loss"] for cell in of_arm), 4),
            "by_step": [
                {"step": rows[0]["step"]}
                | {name: round(mean(row[name] for row in rows), 4) for name in rows[0] if name != "step"}
                for rows in by_step
            ],
        }
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        "| arm | subject fidelity | loss | value error, first to last | gradient's cosine with the true one |",
        "|---|---|---|---|---|",
    ]
    for arm, line in summary.items():
        errors = [point["value_error"] for point in line["by_step"]]
        cosines = [point["corrected"] for point in line["by_step"]]
        lines.append(
            f"| {arm} | {line['fidelity']:.3f} | {line['loss']:.3f} | {errors[0]:.3f} to {errors[-1]:.3f}, mean "
            f"{mean(errors):.3f} | {cosines[0]:.2f} to {cosines[-1]:.2f}, mean {mean(cosines):.2f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print and write the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="What to train.")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS[:4], choices=sorted(embedded_subjects()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of training.")
    parser.add_argument("--skip_blocks", default="0,9", help="The pair of spans.")
    parser.add_argument("--every", type=int, default=10, help="Steps between two measurements.")
    parser.add_argument("--cells", default="trailing_cells", help="Folder of the finished cells.")
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time.")
    parser.add_argument("--only_read", action="store_true", help="Train nothing; show what is finished.")
    args = parser.parse_args(argv)

    folder = Path(args.cells).resolve()
    files = {
        folder / f"{arm}-{subject}-{seed}.json": (
            arm,
            subject,
            seed,
            args.skip_blocks,
            args.every,
            folder / f"{arm}-{subject}-{seed}",
        )
        for seed, subject, arm in itertools.product(args.seeds, args.subjects, args.arms)
    }
    if not args.only_read:
        run_cells(run_cell, files, args.jobs)
    summary = summarise(read_cells(list(files)))
    print(markdown(summary))
    settings = {"skip_blocks": args.skip_blocks, "subjects": args.subjects, "seeds": args.seeds}
    write_figures(args.json, "trailing_span", **settings, results=summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
