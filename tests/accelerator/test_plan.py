"""What the plan says a stage needs, against the bytes that lived on a device that holds what CUDA would hold."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.accelerator.conftest import Job, Ran
from tests.script import ROOT


pytestmark = pytest.mark.slow

TOLERANCE = 0.1
EMBEDDED = "--seed 0 --report_to none --max_train_steps 2 --train_batch_size 4 --num_validation_images 1"
FLUX = (
    "--pretrained_model_name_or_path {flux}/model --instance_data_dir {flux}/photos --instance_prompt dog --rank 16 "
    "--resolution 512 --max_sequence_length 64 --mixed_precision bf16 --train_batch_size 1 --max_train_steps 2 "
    "--seed 0 --report_to none --num_validation_images 1"
)
NO_IMAGES = "--skip_final_inference"

SETTINGS = {
    "embedded, float32": f"{EMBEDDED} --skip_blocks 3,6 --validation_prompt dog",
    "embedded, bf16": f"{EMBEDDED} --skip_blocks 3,6 --mixed_precision bf16 {NO_IMAGES}",
    "embedded, text encoder": f"{EMBEDDED} --skip_blocks 3,6 --train_text_encoder {NO_IMAGES}",
    "flux, 50 % skipped": f"{FLUX} --skip_blocks 4,2 --validation_prompt dog",
    "flux, nothing skipped": f"{FLUX} --skip_blocks none {NO_IMAGES}",
    "flux, checkpointing": f"{FLUX} --skip_blocks none --gradient_checkpointing {NO_IMAGES}",
    "flux, nf4": f"{FLUX} --skip_blocks 4,2 --quantization nf4 {NO_IMAGES}",
    "flux, nf4, checkpointing": f"{FLUX} --skip_blocks 4,2 --quantization nf4 --gradient_checkpointing {NO_IMAGES}",
    "flux, int8": f"{FLUX} --skip_blocks 4,2 --quantization int8 {NO_IMAGES}",
}


def save_flux(folder: Path) -> None:
    """A FLUX of width 512 whose images take two denoising steps, and two photos."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        common = importlib.import_module("common")
    finally:
        sys.path.pop(0)
    size = common.FluxSize(double_blocks=4, single_blocks=8, heads=8)
    common.save_random_flux(folder / "model", size, torch.bfloat16)
    images = {"schema": 1, "pipeline_kwargs": {"height": 512, "width": 512, "num_inference_steps": 2}}
    (folder / "model" / "blockskip_defaults.json").write_text(json.dumps(images))
    common.save_photos(folder / "photos", 2, 512)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_stage_needs_what_is_planned(run: Callable[[str, Job], Ran], once: Any, name: str) -> None:
    once("flux", save_flux)
    ran = run(f"plan of {name}", Job(SETTINGS[name]))
    assert ran.code == 0, ran.said[-2000:]
    peaks = ran.peaks()
    assert {"encode", "train"} <= set(peaks)
    ratios = {stage: round(measured / planned, 3) for stage, (measured, planned) in peaks.items()}
    assert all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values()), ratios
