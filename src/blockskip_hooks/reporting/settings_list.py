"""The settings that a run's page lists: those that counted, with the values that they came to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..planning.plan import planned_stage
from ..residuals.stretches import Stretches
from ..training.run import Run
from ..training.used_flags import without_effect
from ..utils.formatting import format_bytes


# What starts a run and is none of its settings, and flags that no run can use.
_OF_THE_COMMAND = ("config", "dump_config", "plan_only", "local_rank", "hub_token", "overwrite_residuals")
_REFUSED = ("do_fp8_training", "fsdp_text_encoder")
_PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "no"}


def listed_settings(run: Run, plan: Mapping[str, Any], stretches: Stretches, dtype: torch.dtype) -> dict[str, Any]:
    """Settings by flag name, in the order of names, without those that this run does not look at.

    Args:
        run: The prepared run.
        plan: Contents of plan.json.
        stretches: The run's stretches.
        dtype: Of frozen weights.
    """
    left_out = {*_OF_THE_COMMAND, *_REFUSED, *_unused(run)}
    values = {**run.settings.plain(), **_resolved(run, plan, stretches, dtype)}
    return {name: value for name, value in sorted(values.items()) if name not in left_out and value not in (None, [])}


def _unused(run: Run) -> Iterator[str]:
    settings = run.settings
    yield from (name for name, _ in without_effect(settings))
    yield from settings.family_flags.keys() - {flag.name for flag in run.family.own_flags if not flag.refusal}
    for is_used, names in (
        (
            settings.with_prior_preservation,
            "prior_loss_weight num_class_images sample_batch_size prior_generation_precision",
        ),
        (settings.max_train_steps is None, "num_train_epochs"),
        (run.makes_images, "num_validation_images skip_final_inference"),
        (settings.push_to_hub, "push_to_hub"),
        (settings.report_to, "logging_dir"),
    ):
        if not is_used:
            yield from names.split()


def _resolved(run: Run, plan: Mapping[str, Any], stretches: Stretches, dtype: torch.dtype) -> dict[str, Any]:
    """What flags that were left to the run came to."""
    settings, patch = run.settings, run.patch
    values: dict[str, Any] = {
        "max_train_steps": stretches.num_steps,
        "mixed_precision": _PRECISIONS.get(dtype),
        "patch_sampling": patch.mode,
        "max_patch_size": patch.max_size,
        "lora_layers": ",".join(settings.lora_layers or run.family.lora_layers),
        "prodigy_beta3": settings.prodigy_beta3 or math.sqrt(settings.adam_beta2),
    }
    if patch.mode != "none":
        values |= {"min_patch_size": patch.min_size, "patch_positions": patch.positions}
    if patch.buckets:
        values["aspect_ratio_buckets"] = ";".join(f"{height},{width}" for height, width in patch.buckets)
    if run.stores_residuals:
        values |= {
            "residual_dir": str(run.residual_dir),
            "residual_budget": settings.residual_budget or format_bytes(run.residual_budget()),
            "stretch_steps": stretches.length,
            "refresh_residuals": run.refreshes,
            "precompute_batch_size": settings.precompute_batch_size or planned_stage(plan, "precompute").batch_size,
        }
    if run.makes_images:
        values |= {"validation_prompt": " | ".join(run.prompts) or None, "validation_resolution": run.image_size}
    return values
