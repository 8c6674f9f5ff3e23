"""Lines of the first screen about how a run trains and what it draws; the plan has the others."""

from __future__ import annotations

from ..training.learning_rate import describe_rate
from ..training.run import Run
from ..training.samples import expected_schedule
from ..utils.progress import FIRST_SECONDS


TIME = f"Time     not known yet; what is left of each stage is told after {FIRST_SECONDS:.0f} s of it"
"""What the first screen of a run says of its time, which nothing tells before it has begun."""


def training_lines(run: Run, num_steps: int, num_processes: int) -> list[str]:
    """What the learning rate will do in how many steps, and which pictures are made when.

    Args:
        run: The run to carry out.
        num_steps: Its optimiser steps.
        num_processes: Processes that share the work.
    """
    scale = run.samples_per_step(num_processes) if run.settings.scale_lr else 1
    rate, steps = describe_rate(run.settings, num_steps, scale), f"{num_steps} steps"
    lines = [f"Rate     {rate}" + ("" if steps in rate else f"; {steps}")]
    return [*lines, f"Images   {_images(run, num_steps, num_processes)}"]


def _images(run: Run, num_steps: int, num_processes: int) -> str:
    settings = run.settings
    prompts = list(dict.fromkeys([*run.prompts, *run.final_prompts]))
    if not run.makes_images:
        if prompts or settings.skip_final_inference:
            return "none, as asked for"
        subject = settings.instance_prompt or "a photo of sks dog"
        return f'none are made; --validation_prompt "{subject} on a beach" asks for some'
    times = []
    # What an epoch is depends on the number of photos: told in steps, and only if the run gets there.
    every = settings.validation_epochs * expected_schedule(run, num_processes)[0]
    if settings.validation_prompt and every < num_steps:
        times.append(f"every {every} steps ({settings.validation_epochs} epochs)")
    if run.final_prompts:
        times.append("at the end")
    if not times:
        return f"none: the run ends before those of step {every} ({settings.validation_epochs} epochs)"
    by = f", by {settings.validation_model_path}" if run.validation_family else ""
    words = "1 prompt" if len(prompts) == 1 else f"each of {len(prompts)} prompts"
    return f"{settings.num_validation_images} of {words}, {run.image_size} px, {' and '.join(times)}{by}"
