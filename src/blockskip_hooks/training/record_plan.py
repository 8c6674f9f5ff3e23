"""What a run's records depend on: its seed, its settings, and the stretches that they are made in."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.sample_plan import SampleKind, SamplePlan
from ..residuals.batches import PhotoSource
from ..residuals.store import recorded_seed
from ..residuals.stretches import Stretches
from ..utils.digests import component_digests
from ..utils.errors import UserError
from ..utils.machine import versions
from ..version import __version__
from .checkpoints import read_state
from .resume_flags import ON_RESUME
from .run import Run
from .samples import expected_schedule


def resolve_seed(run: Run, checkpoint: Path | None) -> int:
    """The seed: the flag's, the checkpoint's, or a new one that is kept in the report.

    A run that goes on with another seed than it began with draws the samples of the remaining steps from it.
    """
    seed = run.settings.seed
    if checkpoint is not None and "seed" not in run.settings.given:
        seed = read_state(checkpoint)["seed"]
    elif seed is None and run.settings.resume_from_checkpoint:
        # The run ended before its first checkpoint; what it left are records, which are of one seed.
        seed = recorded_seed(run.residual_dir)
    if seed is None:
        # Every process must draw the same samples.
        (seed,) = broadcast_object_list([int.from_bytes(os.urandom(4), "big")])
    return seed


def describe_records(
    run: Run, plan: SamplePlan, sources: dict[SampleKind, PhotoSource], dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that records depend on; its digest is the residual store's fingerprint."""
    path, settings = run.family.model_path, run.settings
    components = ("transformer", "vae", *run.family.text_components)
    return {
        "version": __version__,
        "weights": component_digests(path, components),
        "variant": settings.variant,
        "libraries": {name: versions()[name] for name in ("torch", "diffusers", "transformers")},
        "modulation": list(run.recorded_layers),
        **({"text": "of prompts"} if run.shares_text else {}),
        "spans": [run.config.leading, run.config.trailing] if run.config.residuals == "precomputed" else None,
        **({"refreshed": True} if run.refreshes else {}),
        "residual_dtype": settings.residual_dtype,
        **({"assistant": run.assistant.digest} if run.assistant else {}),
        # Kept blocks lie between the spans, so the trailing residual depends on how they are held.
        **({"quantization": run.quantization.describe()} if run.quantization and run.skips else {}),
        "photos": {
            kind: [[source.photos.digest(i), source.prompt_for(i)] for i in range(len(source.photos))]
            for kind, source in sources.items()
        },
        "samples": {field.name: str(getattr(plan, field.name)) for field in fields(plan) if field.name != "timesteps"},
        "timesteps": hashlib.sha256(plan.timesteps.numpy().tobytes()).hexdigest(),
        **{
            flag.name: str(settings.family_flags[flag.name])
            for flag in run.family.own_flags
            if ON_RESUME[flag.name] == "kept"
        },
        "max_sequence_length": settings.max_sequence_length,
        **({"aligns_prompts": True} if run.aligns_prompts else {}),
        "interpolation": settings.image_interpolation_mode,
        "dtype": str(dtype),
    }


def plan_stretches(run: Run, plan: dict[str, Any], num_processes: int, checkpoint: Path | None) -> Stretches:
    """The run's stretches: the longest whose records fit the residual budget, unless flags ask for shorter ones.

    A resumed run keeps the stretches it began with, whatever the disk has room for now, unless ``--residual_budget``
    says less: records then come out of the same batches. With other samples per step they would be other batches
    anyway.

    Raises:
        UserError: if not even one step's records fit.
    """
    num_steps = expected_schedule(run, num_processes)[1]
    if not run.uses_store:
        return Stretches(num_steps=num_steps, length=num_steps)
    samples_per_step = run.samples_per_step(num_processes)
    state = {} if checkpoint is None else read_state(checkpoint)
    goes_on = bool(state) and state.get("samples_per_step", samples_per_step) == samples_per_step
    if goes_on and run.settings.residual_budget is None:
        return Stretches(num_steps=num_steps, length=state["stretch_steps"], repeats=run.record_repeats)
    planned = plan["residuals"]
    # What the samples of a prompt share is in every stretch.
    text_bytes = planned.get("text_bytes", 0)
    record_bytes = -(-(planned["bytes"] - text_bytes) // planned["records"])
    step_bytes = record_bytes * samples_per_step * len(run.kinds)
    budget = run.residual_budget()
    if step_bytes > budget - text_bytes:
        texts = f", and {text_bytes} for the prompts' texts" if text_bytes else ""
        raise UserError(
            f"--residual_budget is {budget} bytes, less than the records of one step need ({step_bytes}: "
            f"{samples_per_step * len(run.kinds)} of {record_bytes}{texts}); raise it or lower --train_batch_size."
        )
    longest = state["stretch_steps"] if goes_on else run.longest_stretch(num_steps)
    return Stretches(
        num_steps=num_steps,
        length=min(longest, (budget - text_bytes) // step_bytes * run.record_repeats),
        repeats=run.record_repeats,
    )
