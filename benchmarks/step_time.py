#!/usr/bin/env python
"""Training steps with skipped blocks and dynamic patches against plain LoRA at full resolution.

A random FLUX with 57 blocks is trained by the loop of the training script, once plainly and once with 30, 40 and 50 %
of its blocks skipped, all in one process. The settings take turns step by step, so that a machine whose speed drifts
slows all of them alike. Records are dropped from the page cache before each step: they are read from disk.

Example:
    python benchmarks/step_time.py --json benchmarks/results/step_time.json
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from common import (
    PROMPT,
    FluxSize,
    OpenRun,
    benchmark_parser,
    open_run,
    print_targets,
    quiet,
    save_photos,
    save_random_flux,
    target,
    write_figures,
)

from blockskip_hooks.cli.run_plan import plan_for
from blockskip_hooks.planning.counters import Meter
from blockskip_hooks.planning.plan import planned_stage
from blockskip_hooks.residuals.precompute import frozen_model
from blockskip_hooks.utils.formatting import format_bytes


RANK = 16
# (leading, trailing) of 57 blocks: 30 and 50 % from the shipped table of FLUX.1-dev, 40 % by the written rule.
SPANS = {"plain": (0, 0), "30 %": (7, 10), "40 %": (14, 9), "50 %": (19, 9)}
SMOKE = {"double_blocks": 1, "single_blocks": 3, "heads": 1, "resolution": 64, "text_tokens": 8, "rounds": 1}


class Setting:
    """One way to train and what it cost so far.

    Attributes:
        name: A key of :data:`SPANS`.
        run: Its run.
        step_seconds: Seconds of each timed step.
        load_seconds: Of each, the time until the step's batch is complete; only with records.
        precompute_seconds: Seconds of each precompute.
        forward_seconds: Seconds of the bare forward of the same samples.
        peak_bytes: Most live tensor bytes of a training step.
        resident_bytes: Of them, what is there between steps.
    """

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        self.run: OpenRun = open_run(argv)
        self.step_seconds: list[float] = []
        self.load_seconds: list[float] = []
        self.precompute_seconds: list[float] = []
        self.forward_seconds: list[float] = []
        self.peak_bytes = self.resident_bytes = 0
        self.precompute_batch = 1
        self._loading = 0.0
        if self.run.store is not None:
            plan = plan_for(self.run.run, self.run.maker.dtype, 1)
            self.precompute_batch = planned_stage(plan, "precompute").batch_size or 1
            # What a step waits for: reading the records, and making a batch of them.
            store, maker = self.run.store, self.run.maker
            store.read = self._timed(store.read)  # type: ignore[method-assign]
            maker.batch_from_records = self._timed(maker.batch_from_records)  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self._loading += time.perf_counter() - started
            return result

        return call

    def precompute(self, steps: range, full: OpenRun) -> None:
        """Records of ``steps``, and the bare forward of their samples by the whole resident model."""
        if self.run.store is None:
            return
        started = time.perf_counter()
        with quiet():
            self.run.precompute(steps, self.precompute_batch)
        self.precompute_seconds.append(time.perf_counter() - started)
        self.forward_seconds.append(self._bare_forward(steps, full))

    @torch.no_grad()
    def _bare_forward(self, steps: range, full: OpenRun) -> float:
        run, maker, model = self.run, self.run.maker, full.learner.model
        per_step = run.run.samples_per_step(1)
        samples = maker.samples(range(steps.start * per_step, steps.stop * per_step))
        seconds = 0.0
        with run.records.vae() as vae:
            for start in range(0, len(samples), self.precompute_batch):
                part = samples[start : start + self.precompute_batch]
                batch = maker.batch(part, maker.encode(vae, part))
                inputs = run.run.family.transformer_inputs(
                    model.config, batch.noisy_latents, batch.timesteps, batch.embeds
                )
                with frozen_model(model.transformer), full.context.accelerator.autocast():
                    started = time.perf_counter()
                    model.transformer(**inputs, return_dict=False)
                    seconds += time.perf_counter() - started
        return seconds

    def step(self, number: int, timed: bool = True) -> None:
        """Train step ``number``."""
        self._drop_from_page_cache()
        self._loading = 0.0
        with quiet():
            self.run.train(range(number, number + 1))
        if timed:
            self.step_seconds.append(self.run.history.step_seconds[-1])
            self.load_seconds.append(self._loading)

    def _drop_from_page_cache(self) -> None:
        if self.run.store is None or not hasattr(os, "posix_fadvise"):
            return
        for path in self.run.store.directory.glob("records-*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def measure_memory(self, number: int) -> None:
        """Train step ``number`` while live tensors are counted; only this setting's tensors are."""
        run, learner = self.run, self.run.learner
        # Without records the VAE is part of training, and this is the resident one.
        vae = contextlib.nullcontext() if run.store is not None else run.records.vae()
        with vae as resident_vae, Meter() as live:
            for module in (learner.model, resident_vae):
                if module is not None:
                    live.track(module.parameters())
                    live.track(module.buffers())
            for state in learner.optimizer.state.values():
                live.track(value for value in state.values() if isinstance(value, torch.Tensor))
            for embeds in run.maker.embeds.values():
                live.track(embeds.values())
            self.resident_bytes = live.current
            self.step(number, timed=False)
        self.peak_bytes = live.peak

    def figures(self, plain: Setting) -> dict[str, Any]:
        """This setting's results, ratios to ``plain`` among them."""
        run_seconds = sum(self.precompute_seconds) + sum(self.step_seconds)
        store = self.run.store
        has_records = store is not None
        record_bytes = None if store is None else store.num_bytes // len(store)
        loads = [load / step for load, step in zip(self.load_seconds, self.step_seconds)]
        return {
            "name": self.name,
            "leading": self.run.run.config.leading,
            "trailing": self.run.run.config.trailing,
            "training_resolution": self.run.run.patch.training_resolution,
            "step_seconds_median": median(self.step_seconds),
            "step_seconds": self.step_seconds,
            "step_ratio": median(self.step_seconds) / median(plain.step_seconds),
            "peak_live_bytes": self.peak_bytes,
            "resident_bytes": self.resident_bytes,
            "peak_ratio": self.peak_bytes / plain.peak_bytes,
            "record_bytes": record_bytes,
            "record_load_share": median(loads) if has_records else None,
            "precompute_batch_size": self.precompute_batch if has_records else None,
            "precompute_seconds": self.precompute_seconds,
            "bare_forward_seconds": self.forward_seconds,
            "precompute_ratio": sum(self.precompute_seconds) / sum(self.forward_seconds) if has_records else None,
            "run_seconds": run_seconds,
            "run_ratio": run_seconds / sum(plain.step_seconds),
        }


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train every setting and return its figures; the first is plain LoRA."""
    size = FluxSize(args.double_blocks, args.single_blocks, args.heads)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    flux = save_random_flux(folder / "flux", size, dtype)
    photos = save_photos(folder / "photos", 4, args.resolution)
    # One step before timing starts, and one after it to count memory.
    num_steps = args.rounds * args.steps_per_round + 2
    settings = []
    for name, spans in SPANS.items():
        if args.smoke and name not in ("plain", "50 %"):
            continue
        # The same proportions for a model of another depth; at least one block of each kind is skipped.
        leading, trailing = (max(1, round(span / 57 * size.blocks)) if span else 0 for span in spans)
        argv = {
            "--pretrained_model_name_or_path": flux,
            "--instance_data_dir": photos,
            "--instance_prompt": PROMPT,
            "--output_dir": folder / f"output-{leading}-{trailing}",
            "--skip_blocks": f"{leading},{trailing}" if leading else "none",
            "--patch_sampling": "dynamic" if leading else "none",
            "--resolution": args.resolution,
            "--max_sequence_length": args.text_tokens,
            "--train_batch_size": args.batch_size,
            "--max_train_steps": num_steps,
            "--rank": RANK,
            "--lora_alpha": RANK,
            "--mixed_precision": args.mixed_precision,
        }
        settings.append(Setting(name, [str(item) for pair in argv.items() for item in pair]))
    plain = settings[0]

    print("warm-up", flush=True)
    for setting in settings:
        setting.precompute(range(1), plain.run)
        setting.step(0, timed=False)
        setting.precompute_seconds.clear()
        setting.forward_seconds.clear()
    for number in range(args.rounds):
        steps = range(1 + number * args.steps_per_round, 1 + (number + 1) * args.steps_per_round)
        for setting in settings:
            setting.precompute(steps, plain.run)
        for step in steps:
            for setting in settings:
                setting.step(step)
        seconds = ", ".join(f"{s.name} {median(s.step_seconds):.2f} s" for s in settings)
        print(f"round {number + 1} of {args.rounds}: median step {seconds}", flush=True)
    last = range(num_steps - 1, num_steps)
    for setting in settings:
        with quiet():
            setting.run.precompute(last, 1)
        setting.measure_memory(last.start)
    return [setting.figures(plain) for setting in settings]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if a target is missed (a smoke run has none)."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--double_blocks", type=int, default=19, help="Double-stream blocks.")
    parser.add_argument("--single_blocks", type=int, default=38, help="Single-stream blocks.")
    parser.add_argument("--heads", type=int, default=8, help="Attention heads of 64 each.")
    parser.add_argument("--resolution", type=int, default=512, help="Image side of plain LoRA; the others have half.")
    parser.add_argument("--text_tokens", type=int, default=64, help="Tokens of the prompt.")
    parser.add_argument("--batch_size", type=int, default=1, help="Samples per step.")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16", help="As the script's flag.")
    parser.add_argument("--rounds", type=int, default=2, help="Stretches: each precomputes, then trains.")
    parser.add_argument("--steps_per_round", type=int, default=8, help="Timed steps of a stretch.")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts processor seconds, for a machine that other work slows; set OMP_NUM_THREADS=1 with it.",
    )
    parser.add_argument("--smoke", action="store_true", help="A tiny model and two steps: does the benchmark run?")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(SMOKE, steps_per_round=2, mixed_precision="no")

    # The history times steps with perf_counter too.
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.perf_counter", clock):
        results = measure(args, Path(folder))
    print(f"{'setting':10}{'step s':>9}{'ratio':>8}{'peak':>12}{'ratio':>8}{'load':>8}{'precompute':>12}{'run':>8}")
    for row in results:
        line = f"{row['name']:10}{row['step_seconds_median']:9.3f}{row['step_ratio']:8.3f}"
        line += f"{format_bytes(row['peak_live_bytes']):>12}{row['peak_ratio']:8.3f}"
        if row["record_bytes"] is not None:
            line += f"{row['record_load_share']:8.2%}{row['precompute_ratio']:12.3f}{row['run_ratio']:8.3f}"
        print(line)
    half = results[-1]
    targets = [
        target("step at 50 % / plain step", half["step_ratio"], 0.35, 0.30),
        target("peak live bytes at 50 % / plain", half["peak_ratio"], 0.45),
        target("record loading, share of the step at 50 %", half["record_load_share"], 0.05, 0.03),
        target("precompute at 50 % / bare forward", half["precompute_ratio"], 1.15, 1.15),
        target("run with precompute at 50 % / plain run", half["run_ratio"], 0.60, 0.60),
    ]
    if not args.smoke:
        print_targets(targets)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "smoke")}
    settings |= {"rank": RANK, "smoke": args.smoke}
    shown = [] if args.smoke else targets
    write_figures(args.json, "step_time", settings=settings, results=results, targets=shown)
    return 0 if args.smoke or all(item["met"] for item in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
