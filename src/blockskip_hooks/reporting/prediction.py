"""How long the stages of a plan will take on this device, about: the plan's FLOPs at speeds that are measured first.

Where something cannot be measured, or nothing is known of it, no time is predicted.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.training_utils import free_memory

from ..residuals.stretches import Stretches, segments
from ..training.settings import Run
from .progress import Progress
from .speeds import measure_speeds


logger = logging.getLogger(__name__)

LOADING_SECONDS = 0.4
"""What opening the text encoders takes, however small they are."""
TENSOR_SECONDS = 3e-4
"""What fetching a tensor of a skipped block takes beside reading its bytes."""
STEP_SECONDS = 0.004
"""What a training step takes beside forward and backward: the optimizer, records, figures."""


def pieces_of_run(
    run: Run, plan: Mapping[str, Any], stretches: Stretches, num_processes: int, first_step: int = 0
) -> dict[str, int]:
    """What this process has to work through from a step on: prompts, photos, records, steps and images.

    Args:
        run: The prepared run.
        plan: Its plan.
        stretches: Its stretches.
        num_processes: Processes that share records and steps.
        first_step: Steps done before.
    """
    args, num_steps = run.args, stretches.num_steps
    per_step = args.train_batch_size * args.gradient_accumulation_steps * len(run.kinds)
    recorded = sum(len(stretches.recorded(stretch)) for stretch, _ in stretches.following(first_step))
    records = recorded * per_step if run.uses_store else 0
    captions = {args.instance_prompt if photo.caption is None else photo.caption for photo in run.photos}
    prompts = len(captions) + len(run.kinds) - 1 + (args.caption_dropout > 0)
    images = 0
    if run.makes_images:
        shown = list(dict.fromkeys([*run.prompts, *run.final_prompts]))
        prompts += len(shown) + (run.negative_prompt is not None)
        # The base model's and the trained model's at the end; during training the latter's, and beside them those of
        # the base model once.
        rows = 2 * len(run.final_prompts)
        if args.validation_prompt:
            epoch = -(-len(run.photos) * args.repeats // (args.train_batch_size * args.gradient_accumulation_steps))
            epoch = -(-epoch // num_processes)
            during = list(segments(range(first_step, num_steps), max(args.validation_epochs * epoch, 1)))[:-1]
            rows += len(during) * len(run.prompts)
            if during and args.report_to != "none" and run.prompts != run.final_prompts:
                rows += len(run.prompts)
        images = rows * args.num_validation_images
    return {
        "prompts": prompts,
        "photos": records,
        "records": records,
        "steps": num_steps - first_step,
        "images": images,
    }


def expect_work(
    progress: Progress,
    run: Run,
    plan: Mapping[str, Any],
    stretches: Stretches,
    num_processes: int,
    first_step: int | None = None,
) -> None:
    """Tell a display what the run has to work through, and what each piece takes by the plan.

    Args:
        progress: The run's display.
        run: The prepared run.
        plan: Its plan, with the times that are predicted.
        stretches: Its stretches.
        num_processes: Processes that share the work.
        first_step: The step that training goes on from, once prompts are encoded; ``None`` at the start.
    """
    whole = pieces_of_run(run, plan, stretches, num_processes)
    pieces = whole if first_step is None else pieces_of_run(run, plan, stretches, num_processes, first_step)
    seconds = {stage["name"]: stage["seconds"] for stage in plan["stages"]}
    stages = {"prompts": "encode", "records": "precompute", "steps": "train", "images": "validate"}
    encoding = next((stage.get("vae_seconds") for stage in plan["stages"] if stage["name"] == "precompute"), None)
    for kind, count in pieces.items():
        planned = encoding if kind == "photos" else seconds.get(stages[kind])
        if kind == "records" and planned is not None:
            planned -= encoding or 0.0
        if kind == "prompts" and first_step is not None:
            count = 0
        progress.expect(kind, count, None if planned is None or not whole[kind] else planned / whole[kind])


def predict_seconds(
    run: Run, plan: dict[str, Any], dtype: torch.dtype, device: torch.device, stretches: Stretches, processes: int = 1
) -> None:
    """Fill in ``seconds`` of the plan's stages, as far as they can be known; takes about a second.

    Args:
        run: The prepared run.
        plan: Its plan; changed in place.
        dtype: Dtype of frozen weights.
        device: Where the run computes.
        stretches: The run's stretches.
        processes: Processes that share records and steps.
    """
    if run.quantization:
        return  # How fast quantised weights are multiplied depends on kernels that are not there before they are.
    # What the simulation logs of shapes that do not fit is of no interest.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        speeds = measure_speeds(run, plan, dtype, device)
    except Exception:  # a run can go without a prediction, whatever a model's code does to the measurement
        logger.debug("No time is predicted.", exc_info=True)
        return
    finally:
        free_memory()
    pieces = pieces_of_run(run, plan, stretches, processes)
    weights = [weight for part in run.skeleton.streamed_modules.values() for weight in part.parameters()]
    size_of_weights = sum(weight.numel() for weight in weights) * dtype.itemsize
    streaming = size_of_weights / speeds.read + len(weights) * TENSOR_SECONDS
    for stage in plan["stages"]:
        name, size = stage["name"], stage["batch_size"]
        flops = 1e12 * (stage["tflops_per_step"] + stage["attention_tflops_per_step"] - stage["vae_tflops"])
        vae = 1e12 * stage["vae_tflops"]
        if name == "encode":
            reads = pieces["prompts"] if stage["streamed"] else 1
            stage["seconds"] = LOADING_SECONDS + pieces["prompts"] * flops / speeds.forward
            stage["seconds"] += reads * stage["parameter_bytes"] / speeds.read
        elif name == "precompute":
            batches = -(-pieces["records"] // size)
            stage["vae_seconds"] = batches * vae / speeds.encode
            forward = flops / speeds.forward + streaming if run.stores_residuals else 0.0
            stage["seconds"] = stage["vae_seconds"] + batches * forward
        elif name == "train":
            step = flops / speeds.train + vae / speeds.encode
            stage["seconds"] = pieces["steps"] * (step * run.args.gradient_accumulation_steps + STEP_SECONDS)
        elif speeds.decode is not None:
            count = pieces["images"] if name == "validate" else run.args.num_class_images // processes
            forwards = _forwards_per_image(run) * -(-count // size)
            stage["seconds"] = forwards * (flops / speeds.forward + streaming) + count * vae / speeds.decode


def _forwards_per_image(run: Run) -> int:
    """Forwards of the plan's batch for as many images: one per step, or two that guide."""
    stock = inspect.signature(run.family.pipeline_class.__call__).parameters["num_inference_steps"].default
    settings = {"num_inference_steps": stock, **run.family.prompt_inputs(""), **run.pipeline_kwargs}
    # Where a family is always guided, the plan's batch has both prompts.
    guided = run.negative_prompt is not None and run.family.negative_prompt is None
    return settings["num_inference_steps"] * (2 if guided else 1)


__all__ = ["expect_work", "pieces_of_run", "predict_seconds"]
