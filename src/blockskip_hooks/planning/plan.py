"""The plan of a prepared run: what the planner simulates, and the text a run starts with."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..blocks import block_bytes, list_blocks
from ..data.summary import summarize_photos
from ..embedded import DEFAULT_SUBJECT
from ..families import Family
from ..inference.generate import VaePlacement
from ..loading.component_config import load_config
from ..loading.lora_files import WEIGHTS_NAME
from ..loading.models import empty_model
from ..selection import Selection
from ..utils.errors import UserError, first_line
from ..utils.formatting import format_bytes
from ..utils.machine import is_first_process
from .budget import MEMORY_OPTIONS, fit_budget, largest_stage
from .description import format_plan
from .selections import selections_by_bytes
from .stages import PlanRequest, plan_run


if TYPE_CHECKING:
    from ..training.run import Run

logger = logging.getLogger(__name__)


def plan_for(run: Run, dtype: torch.dtype, num_processes: int) -> dict[str, Any]:
    """Simulate the stages of ``run`` and return the contents of ``plan.json``.

    Args:
        run: The prepared run.
        dtype: Dtype of frozen weights.
        num_processes: Processes that share the work.
    """
    settings, family = run.settings, run.family
    steps = run.num_steps(num_processes)
    samples_per_step = run.samples_per_step(num_processes) * len(run.kinds)
    encoders = family.text_encoder_configs()
    streamable = family.streamable_text_encoders(trains_text=settings.train_text_encoder)
    request = PlanRequest(
        family=family,
        transformer_config=run.transformer_config,
        config=run.config,
        patch=run.patch,
        rank=settings.rank,
        lora_targets=run.targets,
        recorded_layers=run.recorded_layers,
        quantization=run.quantization,
        batch_size=settings.train_batch_size * len(run.kinds),
        text_tokens=settings.max_sequence_length,
        weight_dtype=dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        use_8bit_adam=settings.use_8bit_adam,
        cache_latents=settings.cache_latents,
        precompute_batch_size=settings.precompute_batch_size,
        num_samples=steps * samples_per_step,
        samples_per_step=samples_per_step,
        stretch_steps=run.longest_stretch(steps),
        record_repeats=run.record_repeats,
        residual_budget_bytes=run.residual_budget() if run.uses_store else None,
        residual_dtype=settings.residual_dtype,
        text_encoders=list(encoders.values()),
        streamable_encoders=[position for position, name in enumerate(encoders) if name in streamable],
        validation_batch_size=settings.num_validation_images,
        validation_resolution=run.image_size if run.makes_images else None,
        class_batch_size=settings.sample_batch_size if settings.with_prior_preservation else None,
        class_resolution=run.image_size,
        validation_extra_bytes=_weights_bytes(family, dtype),
        bytes_elsewhere=run.bytes_elsewhere(dtype, num_processes),
        selection=run.selection,
    )
    # What it logs of shapes that do not fit would stand beside the one line that says so.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        plan = plan_run(request)
    except RuntimeError as error:
        # Config by config the parts are sound, see `check_model`; what is left is that they do not go together.
        logger.debug("Simulating the run failed.", exc_info=True)
        raise UserError(
            f"--pretrained_model_name_or_path {run.model_name}: a simulated step fails ({first_line(error)}); its "
            "parts are of different models, or, if not, this is a bug."
        ) from error
    if run.table is not None and run.table.leading:
        sizes = block_bytes(list_blocks(run.skeleton.transformer, family.block_stacks), dtype)
        plan["skip"]["trade_off"] = [asdict(point) for point in run.table.trade_off(sizes)]
    return plan


def make_plan(run: Run, dtype: torch.dtype, num_processes: int) -> tuple[Run, dict[str, Any]]:
    """The plan of ``run`` or, with ``--memory_budget``, of the run changed to fit.

    Args:
        run: The prepared run.
        dtype: Dtype of frozen weights.
        num_processes: Processes that share the work.

    Returns:
        The run to carry out and its plan; which blocks the former skips may be another choice than the given run's.

    Raises:
        UserError: if nothing that the flags allow fits.
    """
    settings = run.settings
    if settings.memory_budget is None:
        plan = plan_for(run, dtype, num_processes)
        _check_device(plan)
        return run, plan
    budget = int(settings.memory_budget)
    fixed = "skip_blocks" in settings.given and settings.skip_blocks != "auto"

    def changed(selection: Selection, options: tuple[str, ...]) -> Run:
        return run.skipping(selection, dict(MEMORY_OPTIONS[option] for option in options))

    options = [name for name in MEMORY_OPTIONS if name in settings.memory_options]
    choice = None
    if fixed:
        plan = plan_for(run, dtype, num_processes)
        stage = largest_stage(plan)
        if stage["peak_device_bytes"] > budget:
            raise UserError(
                f"--skip_blocks {settings.skip_blocks} needs {format_bytes(stage['peak_device_bytes'])} in stage "
                f"{stage['name']}, more than --memory_budget {settings.memory_budget}; use --skip_blocks auto."
            )
    else:
        sizes = block_bytes(list_blocks(run.skeleton.transformer, run.family.block_stacks), dtype)
        selections = [selection for selection, _ in selections_by_bytes(sizes, run.table)]
        with tqdm(desc="Fitting the memory budget", unit="plan", disable=None if is_first_process() else True) as bar:

            def planned(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
                bar.update()
                return plan_for(changed(selection, options), dtype, num_processes)

            choice = fit_budget(planned, selections, budget, options)
        run, plan = changed(choice.selection, choice.options), choice.plan
    plan["fits"] = {"budget_bytes": budget, "ok": True, "reason": choice.reason if choice else None}
    return run, plan


def _check_device(plan: dict[str, Any]) -> None:
    """Refuse a run that the accelerator is too small for by plan.

    Raises:
        UserError: naming the stage, what it needs and what there is.
    """
    if not torch.cuda.is_available():
        return
    stage, there = largest_stage(plan), torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if stage["peak_device_bytes"] > there:
        raise UserError(
            f"Stage {stage['name']} needs {format_bytes(stage['peak_device_bytes'])} by plan, and the accelerator has "
            f"{format_bytes(there)}; give --memory_budget {there // 2**30}GiB to let blocks be skipped until it fits."
        )


def _weights_bytes(family: Family, dtype: torch.dtype) -> int:
    """Parameters of the further models that validation images need, in ``dtype``."""
    empty = (empty_model(load_config(family.model_path / name)) for name in family.image_components)
    return sum(parameter.numel() * dtype.itemsize for model in empty for parameter in model.parameters())


def planned_batch_size(plan: dict[str, Any], stage: str) -> int | None:
    """Samples or images per forward of a stage, which need no more memory than a training step, by the plan."""
    return next((planned["batch_size"] for planned in plan["stages"] if planned["name"] == stage), None)


def planned_vae(plan: dict[str, Any], stage: str) -> VaePlacement:
    """How the VAE works in a stage, by the plan."""
    planned: dict[str, Any] = next((planned for planned in plan["stages"] if planned["name"] == stage), {})
    return VaePlacement(alone=planned.get("vae_alone", False), tiled=planned.get("vae_tiled", False))


def streams_text(plan: dict[str, Any]) -> bool:
    """Whether the plan has large text encoders read from the checkpoint layer by layer."""
    return any(stage.get("streamed", False) for stage in plan["stages"])


def describe_plan(run: Run, plan: dict[str, Any]) -> str:
    """The first screen: what happens, on what, in how much memory, and what is written where."""
    settings = run.settings
    own_photos = settings.dataset_name or "instance_data_dir" in settings.given
    photos = (
        settings.dataset_name or settings.instance_data_dir
        if own_photos
        else f"the embedded subject '{DEFAULT_SUBJECT}'"
    )
    model = f"{run.model_name} ({run.family.name})"
    lines = []
    if run.embedded:
        lines.append("No --pretrained_model_name_or_path: using the embedded model, a small real FLUX pipeline.")
        if not own_photos:
            lines.append("No --instance_data_dir: using the embedded photos of a subject it has never seen.")
    folder = run.output_dir
    outputs = {
        "LoRA": str(folder / WEIGHTS_NAME),
        "page and files": f"{folder / 'report.html'}, README.md, plan.json, run_report.json",
        "checkpoints": f"{folder / 'checkpoint-N'}, every {settings.checkpointing_steps} steps",
    }
    if settings.report_to:
        outputs["tracker logs"] = f"{folder / settings.logging_dir} ({','.join(settings.report_to)})"
    if run.uses_store:
        outputs["records"] = str(run.residual_dir) + ("" if settings.residual_dir else " (removed at the end)")
    if settings.push_to_hub:
        outputs["upload"] = settings.hub_model_id or folder.resolve().name
    first, rest = format_plan(plan, model=model, outputs=outputs).split("\n", 1)
    if run.shares_weights:
        rest = f"Sharing  the processes divide the frozen weights of kept blocks (FSDP2)\n{rest}"
    summary = summarize_photos(run.photos, run.patch.shapes)
    lines += [first, summary.describe(str(photos), settings.instance_prompt or ""), rest]
    return "\n".join(lines)


__all__ = ["describe_plan", "make_plan", "plan_for", "planned_batch_size", "planned_vae", "streams_text"]
