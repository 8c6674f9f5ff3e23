"""``--select_on``: a run that measures which blocks to skip before it starts."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import free_memory

from ..blocks import list_blocks
from ..cli.chosen_blocks import choose_blocks
from ..inference.image_encoders import DEFAULT_ENCODER
from ..lora import WEIGHTS_NAME
from ..selection_tables import cache_file, read_table
from ..training.settings import Run, weight_dtype
from ..utils.digests import file_digest, folder_digest
from ..utils.files import write_json
from .masking_search import Subject
from .measure import DEFAULT_SEEDS, DEFAULT_STEPS, SearchRequest, class_subjects, measure_table, open_search


LARGEST_IMAGE = 512
PROBE_SEEDS = (0, 1, 2, 3)
BLOCKS_PER_STRIDE = 18
"""A model of up to twice so many blocks is measured block by block."""

# What a probe does without: it is there to know the subject, not to be kept.
_PROBE_FLAGS: dict[str, Any] = {
    "select_on": "table",
    "strict_table": False,
    "skip_budget": None,
    "memory_budget": None,
    "plan_only": False,
    "with_prior_preservation": False,
    "num_train_epochs": 1,
    "validation_prompt": None,
    "final_validation_prompt": None,
    "skip_final_inference": True,
    "resume_from_checkpoint": None,
    "report_to": "none",
    "push_to_hub": False,
    "save_format": "diffusers",
    "export_merged": False,
}
# What says which blocks are skipped counts for the run itself.
_CHOICE_FLAGS = {"skip_ratio", "skip_budget", "select_on", "selection_encoder", "probe_steps", "strict_table"}


def selection_folder(run: Run) -> Path:
    """Where a run keeps what it measured."""
    return run.output_dir / "selection"


def probe_args(args: argparse.Namespace, run: Run) -> argparse.Namespace:
    """The flags of the short run that lets the model know the subject, with the blocks that are skipped so far.

    Args:
        args: The flags as they were typed.
        run: The prepared run; its folder of the probe depends on photos, weights and flags.
    """
    spans = f"{run.selection.leading},{run.selection.trailing}"
    flags = {**_PROBE_FLAGS, "skip_blocks": spans, "max_train_steps": args.probe_steps}
    flags["checkpointing_steps"] = args.probe_steps + 1
    probe = argparse.Namespace(**{**vars(args), **flags})
    probe.given = (args.given | set(flags)) - _CHOICE_FLAGS
    apart = ("given", "output_dir", "hub_token")
    described = {name: value for name, value in vars(probe).items() if name not in apart}
    photos = [file_digest(photo.path) for photo in run.photos if photo.path is not None]
    weights = folder_digest(run.family.model_path / "transformer")
    text = json.dumps([described, photos, weights], sort_keys=True, default=str)
    probe.output_dir = str(selection_folder(run) / f"probe-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    return probe


def is_trained(probe: argparse.Namespace) -> bool:
    """Whether the probe's LoRA is there from an earlier run."""
    return (Path(probe.output_dir) / WEIGHTS_NAME).is_file()


def search_request(run: Run, accelerator: Accelerator, probe: argparse.Namespace | None) -> SearchRequest:
    """The search of a run: on its own subject if there is a probe LoRA, else on the base model."""
    args, family = run.args, run.family
    multiple = family.latent_token_size
    side = max(min(args.resolution, LARGEST_IMAGE) // multiple * multiple, multiple)
    subjects = class_subjects(embedded=run.embedded)
    if probe is not None:
        prompt = args.instance_prompt or next(photo.caption for photo in run.photos if photo.caption)
        subjects = (Subject("subject", prompt, Path(probe.output_dir)),)
    return SearchRequest(
        family=family,
        model_name=run.model_name,
        subjects=subjects,
        encoder=args.selection_encoder or ("subject" if run.embedded else DEFAULT_ENCODER),
        folder=selection_folder(run),
        seeds=DEFAULT_SEEDS if probe is None else PROBE_SEEDS,
        pipeline_kwargs={
            **run.pipeline_kwargs,
            "height": side,
            "width": side,
            "num_inference_steps": DEFAULT_STEPS,
        },
        stride=max(run.selection.blocks // BLOCKS_PER_STRIDE, 1),
        dtype=weight_dtype(accelerator),
        device=accelerator.device,
        # The probe's LoRA is in the blocks that its run kept.
        spans=None if probe is None else run.config,
    )


def with_measured_table(run: Run, accelerator: Accelerator, probe: argparse.Namespace | None, command: str) -> Run:
    """Measure on one process, and return the run with the blocks that the curves choose.

    The table is written to ``selection/selection.json`` of the run's folder. That of a base model is kept for later
    runs as well, that of a subject is the run's own.

    Raises:
        ValueError: if the encoder cannot be loaded.
    """
    file = selection_folder(run) / "selection.json"
    if accelerator.is_main_process:
        request = search_request(run, accelerator, probe)
        images = open_search(request)
        contents = measure_table(images, request, command)
        write_json(file, contents)
        if probe is None:
            write_json(cache_file(contents["weights"]), contents)
        del images
        free_memory()
    accelerator.wait_for_everyone()
    table = replace(read_table(file), searched=True)
    assert table.num_blocks == len(list_blocks(run.skeleton.transformer, run.family.block_stacks))
    return replace(run, **choose_blocks(run.args, run.family, run.model_name, table))
