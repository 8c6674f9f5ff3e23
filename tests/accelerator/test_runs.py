"""The scripts on a device that is not the CPU: each kind of run ends well, and what it cost the device and the bus."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from safetensors.torch import load_file

from blockskip_hooks.embedded import embedded_model
from tests.accelerator.conftest import EVALUATE, SELECT, Job, Ran
from tests.script import WEIGHTS, assert_same_weights, losses


pytestmark = pytest.mark.slow

SHORT = "--seed 0 --report_to none --max_train_steps 4 --train_batch_size 2 --skip_final_inference"
SKIP = f"{SHORT} --skip_blocks 3,6"
STEPS, RECORDS = 4, 8
# One stretch, whose records are the base model's, and a checkpoint after every step.
PLAIN = SKIP.replace(" --skip_final_inference", "") + " --no-refresh_residuals --checkpointing_steps 1"
WITHOUT_IMAGES = f"{PLAIN} --skip_final_inference"

JOBS = {
    "main": Job(
        "--seed 0 --max_train_steps 4 --train_batch_size 2 --skip_blocks auto --report_to tensorboard "
        "--validation_prompt dog --validation_epochs 1 --num_validation_images 1"
    ),
    "plain": Job(WITHOUT_IMAGES),
    "checkpointing": Job(f"{SKIP} --mixed_precision bf16 --gradient_checkpointing"),
    "nf4": Job(f"{SKIP} --mixed_precision bf16 --quantization nf4"),
    "int8": Job(f"{SKIP} --mixed_precision bf16 --quantization int8"),
    "online residuals, text encoder": Job(f"{SKIP} --residuals online --train_text_encoder"),
    "prior preservation": Job(
        f"{SKIP} --with_prior_preservation --class_prompt dog --num_class_images 2 --class_data_dir {{class-images}}"
    ),
    "search": Job(
        "--prompts dog --seeds 0 --encoder offline --resolution 64 --num_inference_steps 1 --search_stride 9 "
        "--window_lengths --no_cache",
        SELECT,
    ),
    "evaluation": Job(
        "--encoders subject --seeds 0 --num_inference_steps 1 --resolution 64 --prompts {prompts.txt} "
        f"--lora_weights {{plain}}/{WEIGHTS}",
        EVALUATE,
    ),
}

Run = Callable[[str, Job], Ran]


@pytest.mark.parametrize("name", JOBS)
def test_every_run_ends_well_and_leaves_nothing_on_the_device(run: Run, name: str) -> None:
    if name == "evaluation":
        plain = run("plain", JOBS["plain"]).folder
        (plain.parent / "prompts.txt").write_text("a photo of {}\n")
    ran = run(name, JOBS[name])
    assert ran.code == 0, ran.said[-2000:]
    # bitsandbytes keeps a table of its number format.
    assert ran.left_bytes <= (2048 if name == "nf4" else 0)


@pytest.mark.parametrize("name", ["main", "checkpointing", "nf4", "int8", "prior preservation"])
def test_the_host_waits_for_a_step_twice_and_few_bytes_cross(run: Run, name: str) -> None:
    ran = run(name, JOBS[name])
    crossed = ran.traffic["train"]
    # Once for what a step came to, once for the norm of its gradient; after the first also whether LoRA is reached.
    assert crossed["waits"] <= 2 * STEPS + 1
    assert crossed["to_host"] <= 128 * STEPS
    # A step reads its records, and embeddings of their prompts; the LoRA's place is the device.
    record = ran.report["residuals"]["bytes"] / ran.report["residuals"]["records"]
    samples = ran.report["residuals"]["records"]
    assert crossed["to_device"] <= 1.25 * samples * record + 64 * 1024 * STEPS


def test_what_crosses_for_a_record(run: Run) -> None:
    ran = run("plain", JOBS["plain"])
    crossed, written = ran.traffic["precompute"], ran.report["residuals"]["bytes"]
    assert ran.report["residuals"]["records"] == RECORDS
    batches = RECORDS // next(s["batch_size"] for s in ran.plan["stages"] if s["name"] == "precompute")
    # To the host: latents of all samples, then the records, which hold them again.
    assert crossed["to_host"] <= 1.1 * written
    # A wait for the latents of a batch, and one for each tensor of its records.
    assert crossed["waits"] <= 6 * batches
    # To the device: the VAE once, what is skipped once per batch, and a crop and its noise per record.
    weights = _float32_bytes("transformer")
    kept = ran.traffic["load"]["to_device"]
    assert crossed["to_device"] <= _float32_bytes("vae") + batches * (weights - 0.8 * kept) + RECORDS * 128 * 1024


def _float32_bytes(part: str) -> int:
    (file,) = (embedded_model() / part).glob("*.safetensors")
    return sum(4 * tensor.numel() for tensor in load_file(file).values())


@pytest.mark.parametrize("stage", ["encode", "load", "validate"])
def test_memory_that_runs_out_is_one_line_and_loses_nothing(run: Run, stage: str) -> None:
    plain = run("plain", JOBS["plain"])
    limit = 2**20 if stage != "encode" else 2**19
    ran = run(f"out of memory in {stage}", Job(PLAIN, limit=f"{stage}={limit}"))
    assert ran.code == 1 and ran.left_bytes == 0
    assert "Traceback" not in ran.said
    (line,) = [line for line in ran.said.splitlines() if line.startswith("error: ")]
    assert f"Memory ran out in stage {stage}" in line
    if stage == "validate":
        assert_same_weights(ran.folder, plain.folder)


def test_precompute_goes_on_with_smaller_batches(run: Run) -> None:
    plain = run("plain", JOBS["plain"])
    limit = int(0.9 * plain.peaks()["precompute"][0])
    ran = run("out of memory in precompute", Job(WITHOUT_IMAGES, limit=f"precompute={limit}"))
    assert ran.code == 0, ran.said[-2000:]
    assert ran.peaks()["precompute"][0] <= limit
    assert ran.report["residuals"]["records"] == RECORDS
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(losses(ran.folder), losses(plain.folder), strict=True))


def test_training_that_runs_out_of_memory_goes_on_from_its_checkpoint(run: Run) -> None:
    plain = run("plain", JOBS["plain"])
    # The optimiser's state comes with the first step.
    limit = plain.peaks()["train"][0] - 2**20
    ran = run("out of memory in train", Job(WITHOUT_IMAGES, limit=f"train={limit}"))
    assert ran.code == 1
    assert "Memory ran out in stage train" in ran.said and "Traceback" not in ran.said
    resumed = run("resumed", Job(f"{WITHOUT_IMAGES} --resume_from_checkpoint latest", after=ran.folder.name))
    assert resumed.code == 0, resumed.said[-2000:]
    assert "Resuming from checkpoint-1" in resumed.said
    assert losses(resumed.folder) == losses(plain.folder)
    assert_same_weights(resumed.folder, plain.folder)
