"""The plan of a prepared run: what the planner simulates for it, and the first screen that shows it."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from ..blocks import block_bytes, list_blocks
from ..embedded import DEFAULT_SUBJECT
from ..families import Family
from ..loading.component_config import load_config
from ..loading.quantization import read_quantization
from ..lora import WEIGHTS_NAME
from ..planning.budget import BudgetSteps, fit_budget, selections_for_budget
from ..planning.description import format_plan
from ..planning.plan import largest_stage
from ..planning.simulation import empty_model
from ..planning.stages import PlanRequest, plan_run
from ..reporting.progress import is_first_process
from ..selection import Selection
from ..training.settings import Run
from ..training.sharding import bytes_elsewhere
from ..utils.formatting import format_bytes
from .arguments import LAST_MEMORY_OPTIONS, MEMORY_OPTIONS, parse_bytes
from .chosen_blocks import choose_blocks
from .errors import first_line


logger = logging.getLogger(__name__)


def plan_request(run: Run, dtype: torch.dtype, num_processes: int) -> PlanRequest:
    """What the planner has to know of ``run``.

    Args:
        run: The prepared run.
        dtype: Dtype of frozen weights.
        num_processes: Processes that share the work.
    """
    args, family = run.args, run.family
    steps = run.num_steps(num_processes)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes * len(run.kinds)
    encoders = family.text_encoder_configs()
    streamable = family.streamable_text_encoders(trains_text=args.train_text_encoder)
    return PlanRequest(
        family=family,
        transformer_config=run.transformer_config,
        config=run.config,
        patch=run.patch,
        rank=args.rank,
        lora_targets=run.targets,
        recorded_layers=run.recorded_layers,
        quantization=run.quantization,
        batch_size=args.train_batch_size * len(run.kinds),
        text_tokens=args.max_sequence_length,
        weight_dtype=dtype,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        use_8bit_adam=args.use_8bit_adam,
        cache_latents=args.cache_latents,
        precompute_batch_size=args.precompute_batch_size,
        num_samples=steps * samples_per_step,
        samples_per_step=samples_per_step,
        stretch_steps=run.longest_stretch(steps),
        record_repeats=run.record_repeats,
        residual_budget_bytes=run.residual_budget() if run.uses_store else None,
        residual_dtype=args.residual_dtype,
        text_encoders=list(encoders.values()),
        streamable_encoders=[position for position, name in enumerate(encoders) if name in streamable],
        validation_batch_size=args.num_validation_images,
        validation_resolution=run.image_size if run.makes_images else None,
        class_batch_size=args.sample_batch_size if args.with_prior_preservation else None,
        class_resolution=run.image_size,
        validation_extra_bytes=_weights_bytes(family, dtype),
        bytes_elsewhere=_bytes_elsewhere(run, dtype, num_processes),
        selection=run.selection,
    )


def plan_for(run: Run, dtype: torch.dtype, num_processes: int) -> dict[str, Any]:
    """Simulate the stages of ``run`` and return the contents of ``plan.json``.

    Args:
        run: The prepared run.
        dtype: Dtype of frozen weights.
        num_processes: Processes that share the work.

    Raises:
        ValueError: if a simulated step fails, because the parts of the model do not go together.
    """
    # What it logs of shapes that do not fit would stand beside the one line that says so.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        plan = plan_run(plan_request(run, dtype, num_processes))
    except RuntimeError as error:
        # Config by config the parts are sound, see `check_model`; what is left is that they do not go together.
        logger.debug("Simulating the run failed.", exc_info=True)
        raise ValueError(
            f"--pretrained_model_name_or_path {run.model_name}: a simulated step fails ({first_line(error)}); its "
            "parts are of different models, or, if not, this is a bug."
        ) from error
    if run.table is not None and run.table.leading:
        sizes = block_bytes(list_blocks(run.skeleton.transformer, run.family.block_stacks), dtype)
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
        ValueError: if nothing that the flags allow fits.
    """
    args = run.args
    if args.memory_budget is None:
        plan = plan_for(run, dtype, num_processes)
        _check_device(plan)
        return run, plan
    budget = parse_bytes(args.memory_budget)
    fixed = "skip_blocks" in args.given and args.skip_blocks != "auto"
    sizes = block_bytes(list_blocks(run.skeleton.transformer, run.family.block_stacks), dtype)
    steps = BudgetSteps(
        selections=[run.selection] if fixed else selections_for_budget(sizes, run.table),
        options=[name for name in MEMORY_OPTIONS if name in args.memory_options and name not in LAST_MEMORY_OPTIONS],
        last_options=[name for name in LAST_MEMORY_OPTIONS if name in args.memory_options],
    )
    with tqdm(desc="Fitting the memory budget", unit="plan", disable=None if is_first_process() else True) as bar:

        def planned(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
            bar.update()
            return plan_for(_changed(run, selection, options), dtype, num_processes)

        choice = fit_budget(planned, steps, budget)
    choice.plan["fits"] = {"budget_bytes": budget, "ok": True, "reason": choice.reason}
    return _changed(run, choice.selection, choice.options), choice.plan


def _changed(run: Run, selection: Selection, options: tuple[str, ...]) -> Run:
    """``run`` with other blocks skipped and some of ``--memory_options`` in use."""
    settings = argparse.Namespace(**{**vars(run.args), **dict(MEMORY_OPTIONS[option] for option in options)})
    # A pair of numbers is taken as it is; what it was taken from is said by the selection.
    settings.skip_blocks = f"{selection.leading},{selection.trailing}" if selection.num_skipped else "none"
    blocks = choose_blocks(settings, run.family, run.model_name, run.table) | {"selection": selection}
    return replace(run, args=settings, quantization=read_quantization(settings), **blocks)


def _check_device(plan: dict[str, Any]) -> None:
    """Refuse a run that the accelerator is too small for by plan.

    Raises:
        ValueError: naming the stage, what it needs and what there is.
    """
    if not torch.cuda.is_available():
        return
    stage, there = largest_stage(plan), torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if stage["peak_device_bytes"] > there:
        raise ValueError(
            f"Stage {stage['name']} needs {format_bytes(stage['peak_device_bytes'])} by plan, and the accelerator has "
            f"{format_bytes(there)}; give --memory_budget {there // 2**30}GiB to let blocks be skipped until it fits."
        )


def _bytes_elsewhere(run: Run, dtype: torch.dtype, num_processes: int) -> int | None:
    """Kept blocks' weights that other processes hold; ``None`` where they are not shared."""
    if not run.shares_weights:
        return None
    skeleton = run.skeleton
    return bytes_elsewhere(skeleton.transformer, skeleton.spans.kept, run.recorded_layers, dtype, num_processes)


def _weights_bytes(family: Family, dtype: torch.dtype) -> int:
    """Parameters of the further models that validation images need, in ``dtype``."""
    empty = (empty_model(load_config(family.model_path / name)) for name in family.image_components)
    return sum(parameter.numel() * dtype.itemsize for model in empty for parameter in model.parameters())


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
    folder = run.output_dir
    outputs = {
        "LoRA": str(folder / WEIGHTS_NAME),
        "page and files": f"{folder / 'report.html'}, README.md, plan.json, run_report.json",
        "checkpoints": f"{folder / 'checkpoint-N'}, every {args.checkpointing_steps} steps",
    }
    if args.report_to != "none":
        outputs["tracker logs"] = f"{folder / args.logging_dir} ({args.report_to})"
    if run.uses_store:
        outputs["records"] = str(run.residual_dir) + ("" if args.residual_dir else " (removed at the end)")
    if args.push_to_hub:
        outputs["upload"] = args.hub_model_id or folder.resolve().name
    first, rest = format_plan(plan, model=model, outputs=outputs).split("\n", 1)
    if run.shares_weights:
        rest = f"Sharing  the processes divide the frozen weights of kept blocks (FSDP2)\n{rest}"
    lines += [first, f'Photos   {len(run.photos)} from {photos}, prompt "{args.instance_prompt}"', rest]
    return "\n".join(lines)


__all__ = ["describe_plan", "make_plan", "plan_for", "plan_request"]
