"""The plan of a prepared run: what the planner simulates for it, and the first screen that shows it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from ..data.summary import summarize_photos
from ..embedded import DEFAULT_SUBJECT
from ..families import Family
from ..loading.component_config import load_config
from ..loading.models import empty_model
from ..planning.budget import BudgetSteps, fit_budget, selections_for_budget
from ..planning.description import format_plan
from ..planning.devices import DeviceType, rules_for
from ..planning.options import LAST_MEMORY_OPTIONS, MEMORY_OPTIONS
from ..planning.plan import largest_stage
from ..planning.request import PlanRequest
from ..planning.stages import plan_run
from ..selection import Selection
from ..training.run import Run
from ..training.samples import expected_schedule
from ..utils.device_memory import total_memory_bytes
from ..utils.errors import UserError, first_line
from ..utils.formatting import fit_lines, format_bytes
from ..utils.machine import is_first_process


logger = logging.getLogger(__name__)


def planned_device(device: torch.device, *, plan_only: bool) -> DeviceType:
    """Whose rules a run is planned by: those of its own device.

    A plan alone, where there is no accelerator, is for another machine and by CUDA's rules, unless accelerate was told
    to use the CPU.

    Args:
        device: The device that accelerate chose.
        plan_only: Whether there is a plan alone.
    """
    if plan_only and device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cuda"
    return rules_for(device.type)


def plan_request(run: Run, dtype: torch.dtype, num_processes: int, device: DeviceType = "cuda") -> PlanRequest:
    """What the planner has to know of ``run``.

    Args:
        run: The prepared run.
        dtype: Dtype of frozen weights.
        num_processes: Processes that share the work.
        device: Whose rules it is planned by.
    """
    settings, family = run.settings, run.family
    steps = expected_schedule(run, num_processes)[1]
    samples_per_step = run.samples_per_step(num_processes) * len(run.kinds)
    encoders = family.text_encoder_configs() if settings.train_text_encoder else {}
    request = PlanRequest(
        **_of_model(family, dtype, trains_text=settings.train_text_encoder),
        device=device,
        config=run.config,
        patch=run.patch,
        rank=settings.rank,
        lora_targets=run.targets,
        lora_dropout=settings.lora_dropout,
        assistant_layers=run.assistant.layers() if run.assistant else {},
        recorded_layers=run.recorded_layers,
        quantization=run.quantization,
        batch_size=settings.train_batch_size * len(run.kinds),
        photo_prompts=_photo_prompts(run),
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
        has_condition=settings.condition_flag is not None,
        trained_encoders={name: encoders[name] for name in encoders if name in family.trained_text_components},
        validation_batch_size=settings.num_validation_images,
        validation_prompts=len(set(run.prompts) | set(run.final_prompts)) or 1,
        validation_resolution=run.image_size if run.makes_images else None,
        class_batch_size=settings.sample_batch_size if settings.with_prior_preservation else None,
        class_images=settings.num_class_images,
        class_resolution=run.class_image_size,
        memory_budget_bytes=settings.memory_budget,
        bytes_elsewhere=_bytes_elsewhere(run, dtype, num_processes),
        selection=run.selection,
    )
    if (other := run.validation_family) is None:
        return request
    validation = replace(request, **_of_model(other, dtype, trains_text=False), assistant_layers={})
    return replace(request, validation=validation)


def _of_model(family: Family, dtype: torch.dtype, *, trains_text: bool) -> dict[str, Any]:
    """What a plan depends on of a model that makes images, by field of ``PlanRequest``."""
    encoders = family.text_encoder_configs()
    streamable = family.streamable_text_encoders(trains_text=trains_text)
    return {
        "family": family,
        "transformer_config": load_config(family.model_path / "transformer"),
        "text_tokens": family.flags["max_sequence_length"],
        "text_encoders": list(encoders.values()),
        "streamable_encoders": [position for position, name in enumerate(encoders) if name in streamable],
        "validation_extra_bytes": _weights_bytes(family, dtype),
    }


def _bytes_elsewhere(run: Run, dtype: torch.dtype, num_processes: int) -> int | None:
    """Bytes of kept blocks' weights that other processes hold at a process's peak; ``None`` if none are shared.

    One block runs and the next is gathered meanwhile. What is outside of blocks stays gathered and counts as whole.
    """
    if not run.shares_weights:
        return None
    recorded = [run.skeleton.transformer.get_submodule(name) for name in run.recorded_layers]
    absent = {id(parameter) for layer in recorded for parameter in layer.parameters()}
    resident = [
        sum(p.numel() for p in block.module.parameters() if id(p) not in absent) * dtype.itemsize
        for block in run.skeleton.spans.kept
    ]
    whole = sum(resident)
    return max(whole - whole // num_processes - sum(sorted(resident)[-2:]), 0)


def _photo_prompts(run: Run) -> int:
    """Prompts that photos are trained with, at most."""
    captions = {photo.caption or run.settings.instance_prompt for photo in run.photos}
    return len(captions) + run.settings.with_prior_preservation + (run.settings.caption_dropout > 0)


def plan_for(run: Run, dtype: torch.dtype, num_processes: int, device: DeviceType = "cuda") -> dict[str, Any]:
    """Simulate the stages of ``run`` and return the contents of ``plan.json``.

    Args:
        run, dtype, num_processes, device: As for :func:`plan_request`.

    Raises:
        UserError: if a simulated step fails, because the parts of the model do not go together.
    """
    # What it logs of shapes that do not fit would stand beside the one line that says so.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        plan = plan_run(plan_request(run, dtype, num_processes, device))
    except RuntimeError as error:
        # Config by config the parts are sound, see `check_model`; what is left is that they do not go together.
        logger.debug("Simulating the run failed.", exc_info=True)
        raise UserError(
            f"--pretrained_model_name_or_path {run.model_name}: a simulated step fails ({first_line(error)}); its "
            "parts are of different models, or, if not, this is a bug."
        ) from error
    if run.table is not None and run.table.leading:
        plan["skip"]["trade_off"] = [asdict(point) for point in run.table.trade_off(run.block_bytes(dtype))]
    return plan


def make_plan(
    run: Run, dtype: torch.dtype, num_processes: int, device: DeviceType = "cuda"
) -> tuple[Run, dict[str, Any]]:
    """The plan of ``run`` or, with ``--memory_budget``, of the run changed to fit.

    Args:
        run, dtype, num_processes, device: As for :func:`plan_request`.

    Returns:
        The run to carry out and its plan; which blocks the former skips may be another choice than the given run's.

    Raises:
        UserError: if nothing that the flags allow fits.
    """
    settings = run.settings
    if settings.memory_budget is None:
        plan = plan_for(run, dtype, num_processes, device)
        _check_device(plan)
        return run, plan

    def chosen_flags(options: tuple[str, ...]) -> dict[str, Any]:
        return dict(MEMORY_OPTIONS[option] for option in options)

    budget = settings.memory_budget
    fixed = "skip_blocks" in settings.given and settings.skip_blocks != "auto"
    allowed = [name for name in MEMORY_OPTIONS if name in settings.memory_options]
    steps = BudgetSteps(
        selections=[run.selection] if fixed else selections_for_budget(run.block_bytes(dtype), run.table),
        options=[name for name in allowed if name not in LAST_MEMORY_OPTIONS],
        last_options=[name for name in allowed if name in LAST_MEMORY_OPTIONS],
    )
    with tqdm(desc="Fitting the memory budget", unit="plan", disable=None if is_first_process() else True) as bar:

        def planned(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
            bar.update()
            return plan_for(run.skipping(selection, chosen_flags(options)), dtype, num_processes, device)

        choice = fit_budget(planned, steps, budget)
    choice.plan["fits"] = {"budget_bytes": budget, "ok": True, "reason": choice.reason}
    return run.skipping(choice.selection, chosen_flags(choice.options)), choice.plan


def _check_device(plan: dict[str, Any]) -> None:
    """Refuse a run that the accelerator is too small for by plan.

    Raises:
        UserError: naming the stage, what it needs and what there is.
    """
    stage, there = largest_stage(plan), total_memory_bytes()
    if there is not None and stage["needed_bytes"] > there:
        raise UserError(
            f"Stage {stage['name']} needs {format_bytes(stage['needed_bytes'])} by plan, and the accelerator has "
            f"{format_bytes(there)}; give --memory_budget {there // 2**30}GiB to let blocks be skipped until it fits."
        )


def _weights_bytes(family: Family, dtype: torch.dtype) -> int:
    """Parameters of the further models that validation images need, in ``dtype``."""
    empty = (empty_model(load_config(family.model_path / name)) for name in family.image_components)
    return sum(parameter.numel() * dtype.itemsize for model in empty for parameter in model.parameters())


def describe_plan(run: Run, plan: dict[str, Any], further: Sequence[str] = ()) -> str:
    """The first screen: what happens, on what, in how much memory, and what is written where.

    Args:
        run: The run to carry out.
        plan: Its plan.
        further: Lines of how it trains.
    """
    settings = run.settings
    own_photos = settings.dataset_name or "instance_data_dir" in settings.given
    photos = (
        settings.dataset_name or settings.instance_data_dir
        if own_photos
        else f"the embedded subject {DEFAULT_SUBJECT}"
    )
    model = f"{run.model_name} ({run.family.name})" + (", as no other was named" if run.embedded else "")
    outputs = {}
    if run.uses_store and settings.residual_dir:
        outputs["records"] = str(run.residual_dir)
    if settings.push_to_hub:
        outputs["upload"] = settings.hub_model_id or run.output_dir.resolve().name
    on_cpu = {}
    if not torch.accelerator.is_available():
        held = format_bytes(psutil.Process().memory_info().rss)
        on_cpu["besides"] = f"add {held} for Python and its libraries"
    first, rest = format_plan(plan, model=model, folder=str(run.output_dir), outputs=outputs, **on_cpu).split("\n", 1)
    if run.shares_weights:
        rest = f"Sharing  the processes divide the frozen weights of kept blocks (FSDP2)\n{rest}"
    summary = summarize_photos(run.photos, run.patch.shapes)
    lines = [first, summary.describe(str(photos), settings.instance_prompt or ""), *further, rest]
    return fit_lines("\n".join(lines))
