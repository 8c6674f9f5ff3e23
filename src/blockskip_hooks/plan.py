"""The plan of a prepared run: what the planner simulates, and the text a run starts with."""

from __future__ import annotations

import json
from typing import Any

import torch

from .embedded import DEFAULT_SUBJECT
from .families import Family
from .model_config import load_config
from .planner import PlanRequest, format_plan, plan_run
from .run import Run
from .simulation import empty_model


def plan_for(run: Run, dtype: torch.dtype, num_processes: int) -> dict[str, Any]:
    """Simulate the stages of ``run`` and return the contents of ``plan.json``.

    Args:
        run: The prepared run.
        dtype: Dtype of frozen weights.
        num_processes: Processes that share the work.
    """
    args, family = run.args, run.family
    num_images = {kind: args.num_class_images if kind == "class" else len(run.photos) for kind in run.kinds}
    _, steps = run.schedule(run.sample_plan(args.seed or 0, num_images), num_processes)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes * len(run.kinds)
    request = PlanRequest(
        family=family,
        transformer_config=run.transformer_config,
        config=run.config,
        patch=run.patch,
        rank=args.rank,
        lora_targets=run.targets,
        recorded_layers=run.recorded_layers,
        batch_size=args.train_batch_size * len(run.kinds),
        text_tokens=args.max_sequence_length,
        weight_dtype=dtype,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        use_8bit_adam=args.use_8bit_adam,
        cache_latents=args.cache_latents,
        precompute_batch_size=args.precompute_batch_size,
        num_samples=steps * samples_per_step,
        residual_budget_bytes=run.residual_budget() if run.uses_store else None,
        text_encoders=_text_encoder_configs(family),
        validation_batch_size=args.num_validation_images,
        validation_resolution=run.image_size if run.makes_images else None,
        class_batch_size=args.sample_batch_size if args.with_prior_preservation else None,
        class_resolution=run.image_size,
        validation_extra_bytes=_weights_bytes(family, dtype),
        skip_source=run.selection.source,
        skip_table=run.selection.table,
    )
    return plan_run(request)


def _weights_bytes(family: Family, dtype: torch.dtype) -> int:
    """Parameters of the further models that validation images need, in ``dtype``."""
    empty = (empty_model(load_config(family.model_path / name)) for name in family.image_components)
    return sum(parameter.numel() * dtype.itemsize for model in empty for parameter in model.parameters())


def _text_encoder_configs(family: Family) -> list[dict[str, Any]]:
    """Configs of the text encoders, with the class that the pipeline's index names: a config may lack it."""
    index = json.loads((family.model_path / "model_index.json").read_text())
    configs = []
    for name in family.text_components:
        file = family.model_path / name / "config.json"
        if file.is_file():
            configs.append({**json.loads(file.read_text()), "architectures": [index[name][1]]})
    return configs


def planned_batch_size(plan: dict[str, Any], stage: str) -> int | None:
    """Samples or images per forward of a stage, which need no more memory than a training step, by the plan."""
    return next((planned["batch_size"] for planned in plan["stages"] if planned["name"] == stage), None)


def describe_plan(run: Run, plan: dict[str, Any]) -> str:
    """The first screen: what happens, on what, in how much memory, and what is written where."""
    args = run.args
    own_photos = args.dataset_name or "instance_data_dir" in args.given
    photos = args.dataset_name or args.instance_data_dir if own_photos else f"the embedded subject '{DEFAULT_SUBJECT}'"
    model = f"{run.model_name} ({run.family.name})"
    lines = []
    if run.embedded:
        lines.append("No --pretrained_model_name_or_path: using the embedded model, a small real FLUX pipeline.")
        if not own_photos:
            lines.append("No --instance_data_dir: using the embedded photos of a subject it has never seen.")
    outputs = {
        "LoRA, report, plan, card": str(run.output_dir),
        "checkpoints": f"every {args.checkpointing_steps} steps",
    }
    if run.uses_store:
        outputs["records"] = str(run.residual_dir) + ("" if args.residual_dir else " (removed at the end)")
    lines.append(format_plan(plan, model=model, outputs=outputs))
    lines.insert(-1, f'Photos   {len(run.photos)} from {photos}, prompt "{args.instance_prompt}"')
    return "\n".join(lines)


__all__ = ["describe_plan", "plan_for", "planned_batch_size"]
