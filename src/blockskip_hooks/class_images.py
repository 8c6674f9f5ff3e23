"""Class images for prior preservation, made by the base pipeline when the folder lacks some."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

from .data import image_paths
from .run import Run
from .sample_plan import derived_seed


PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_class_images(run: Run, accelerator: Accelerator, dtype: torch.dtype, seed: int) -> int:
    """Fill ``--class_data_dir`` up to ``--num_class_images``, the work shared between processes.

    Components are offloaded to host memory while they are not in use, so the peak is one component's, and everything
    is freed before training. Image number i has the same noise in every run.

    Returns:
        Number of images made by this process.
    """
    args, family = run.args, run.family
    folder = Path(args.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    present = len(image_paths(folder))
    accelerator.wait_for_everyone()
    numbers = list(range(present, args.num_class_images))[accelerator.process_index :: accelerator.num_processes]
    if numbers:
        dtype = PRECISIONS.get(args.prior_generation_precision, dtype)
        pipeline = family.load_pipeline(dtype)
        pipeline.set_progress_bar_config(disable=True)
        if accelerator.device.type == "cpu":
            pipeline.to("cpu")
        else:
            pipeline.enable_model_cpu_offload(device=accelerator.device)
        progress = tqdm(total=len(numbers), desc="Class images", disable=not accelerator.is_local_main_process)
        for start in range(0, len(numbers), args.sample_batch_size):
            part = numbers[start : start + args.sample_batch_size]
            generators = [torch.Generator().manual_seed(derived_seed(seed, "class image", n)) for n in part]
            images = pipeline(
                **{**family.prompt_inputs(args.class_prompt), **run.pipeline_kwargs},
                num_images_per_prompt=len(part),
                generator=generators,
            ).images
            for number, image in zip(part, images, strict=True):
                digest = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
                image.save(folder / f"{number}-{digest}.jpg")
                progress.update()
        progress.close()
        del pipeline
        free_memory()
    accelerator.wait_for_everyone()
    return len(numbers)
