"""Cells of a table on the embedded model: LoRAs trained by the ordinary script, and what their images are like.

A cell that is finished is never run again, so that a killed benchmark goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import load_script, run_in_process
from diffusers import FluxPipeline
from PIL import Image
from tqdm.auto import tqdm

from blockskip_hooks.embedded import embedded_model, embedded_photos, embedded_subjects
from blockskip_hooks.evaluation.metrics import Evaluation, evaluate_images
from blockskip_hooks.inference.image_encoders import load_image_encoder
from blockskip_hooks.loading.model_defaults import model_defaults
from blockskip_hooks.training.records import RecordSource
from blockskip_hooks.utils.files import write_json


SUBJECTS = ("dog", "robot", "clock", "teapot", "backpack", "teddy_bear")
IMAGES_PER_PROMPT, IMAGE_STEPS, IMAGE_SEED = 2, 12, 100


def run_script(
    output: Path, subject: str, seed: int, flags: Mapping[str, Any], records: type[RecordSource] = RecordSource
) -> None:
    """Run the training script on one subject, in this process.

    Args:
        output: The run's folder.
        subject: Name of an embedded subject.
        seed: Seed of the run.
        flags: Further flags; ``True`` for those without a value.
        records: What batches come from, where a step is studied.

    Raises:
        RuntimeError: if the script fails.
    """
    script = load_script("train_dreambooth_blockskip")
    script.RecordSource = records  # type: ignore[attr-defined]
    settings = {
        "--instance_data_dir": embedded_photos(subject),
        "--instance_prompt": embedded_subjects()[subject]["instance_prompt"],
        "--seed": seed,
        "--output_dir": output,
        "--report_to": "none",
        "--num_validation_images": 0,
        "--checkpointing_steps": 10**6,
        **flags,
    }
    run_in_process(script, [str(item) for pair in settings.items() for item in pair if item is not True])


def train(
    output: Path, subject: str, seed: int, flags: Mapping[str, Any], records: type[RecordSource] = RecordSource
) -> dict[str, Any]:
    """Train one LoRA by the script and return its ``run_report.json``; see :func:`run_script`."""
    run_script(output, subject, seed, flags, records)
    return json.loads((output / "run_report.json").read_text())


def evaluate(lora: Path | None, subject: str) -> Evaluation:
    """Measure images of prompts that training has not seen, with a LoRA or without any."""
    flags, call = model_defaults(embedded_model())
    pipeline = FluxPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    prompts = embedded_subjects()[subject]["validation_prompts"]
    images = pipeline(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=call["true_cfg_scale"],
        height=flags["resolution"],
        width=flags["resolution"],
        max_sequence_length=flags["max_sequence_length"],
        num_inference_steps=IMAGE_STEPS,
        num_images_per_prompt=IMAGES_PER_PROMPT,
        generator=[torch.Generator().manual_seed(IMAGE_SEED + i) for i in range(len(prompts) * IMAGES_PER_PROMPT)],
    ).images
    photos = [Image.open(path) for path in sorted(embedded_photos(subject).glob("*.png"))]
    repeated = [prompt for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]
    return evaluate_images(images, photos, load_image_encoder("subject"), repeated, subject=subject)


def run_cells(
    run_cell: Callable[[Any], dict[str, Any]], cells: Mapping[Path, Any], jobs: int, description: str = "Cells"
) -> None:
    """Run the cells whose files are not there, some at a time, and write what each returns to its file.

    Args:
        run_cell: Takes a cell.
        cells: Cells by their files.
        jobs: Cells at a time.
        description: What the progress bar says.
    """
    missing = [(run_cell, path, cell) for path, cell in cells.items() if not path.is_file()]
    for folder in {path.parent for path in cells}:
        folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=4) as pool:
        for _ in tqdm(pool.imap_unordered(_run, missing), total=len(missing), desc=description, unit="cell"):
            pass


def read_cells(cells: Sequence[Path]) -> list[dict[str, Any]]:
    """What the finished ones of the cells returned."""
    return [json.loads(path.read_text()) for path in cells if path.is_file()]


def _run(job: tuple[Callable[[Any], dict[str, Any]], Path, Any]) -> None:
    run_cell, path, cell = job
    torch.set_num_threads(1)
    write_json(path, run_cell(cell))
