"""Class images for prior preservation, made by the base model when the folder lacks some."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from diffusers.training_utils import free_memory

from ..data.folder import image_paths
from ..families.prompts import encode_prompts
from ..inference.generate import generate_images
from ..planning.plan import planned_stage, sends_ahead, streams_text
from ..transformer import DiTBlockSkipTransformer
from ..utils.accelerator import PRECISIONS, weight_dtype
from ..utils.files import replacing
from ..utils.seeds import derived_seed
from .context import Context
from .run import Run


_OWN_NAME = re.compile("([0-9]+)-[0-9a-f]{40}[.]jpg")


def make_class_images(run: Run, context: Context, plan: dict[str, Any]) -> None:
    """Fill ``--class_data_dir`` up to ``--num_class_images``, the work shared between processes.

    Works as the rest of the run does, and so within its memory: text encoders first and freed, then kept blocks in
    memory and skipped ones streamed. Image number i has the same noise in every run.

    Args:
        run: The run, its seed resolved.
        context: Its surroundings.
        plan: Its plan: how many images are made at a time, and how text encoders and VAE work.
    """
    accelerator, planned = context.accelerator, planned_stage(plan, "class_images")
    batch_size = planned.batch_size or 1
    settings, family, device = run.settings, run.family, accelerator.device
    folder, prompt = settings.class_folder, settings.class_prompt or ""
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in image_paths(folder)]
    made = {int(match[1]) for name in names if (match := _OWN_NAME.fullmatch(name))}
    accelerator.wait_for_everyone()
    # Processes that were killed leave gaps.
    missing = [number for number in range(len(names) - len(made), settings.num_class_images) if number not in made]
    missing = missing[: max(settings.num_class_images - len(names), 0)]
    numbers = missing[accelerator.process_index :: accelerator.num_processes]
    if numbers:
        dtype = PRECISIONS.get(settings.prior_generation_precision or "", weight_dtype(accelerator))
        prompts = [prompt, *([] if run.negative_prompt is None else [run.negative_prompt])]
        embeds, _ = encode_prompts(family, prompts, dtype=dtype, device=device, streamed=streams_text(plan))
        model = DiTBlockSkipTransformer.from_pretrained(
            family.model_path, run.config, **run.model_options(dtype, device), sends_ahead=sends_ahead(plan)
        )
        vae = family.load_vae(dtype, device)
        with context.progress.stage("class images", class_images=len(numbers)) as display:
            for start in range(0, len(numbers), planned.together * batch_size):
                part = numbers[start : start + planned.together * batch_size]
                (images,) = generate_images(
                    [embeds[prompt]],
                    family=family,
                    model=model,
                    vae=vae,
                    negative=None if run.negative_prompt is None else embeds[run.negative_prompt],
                    seeds=[derived_seed(run.seed, "class image", number) for number in part],
                    pipeline_kwargs=run.pipeline_kwargs,
                    images_at_once=batch_size,
                    together=planned.together,
                    placement=planned.vae,
                )
                for number, image in zip(part, images, strict=True):
                    digest = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
                    with replacing(folder / f"{number}-{digest}.jpg") as file:
                        image.save(file, format="JPEG")
                    display.update()
        del model, vae
        free_memory()
    accelerator.wait_for_everyone()
