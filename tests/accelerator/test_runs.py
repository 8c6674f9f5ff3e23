"""The scripts on a device that is not the CPU: each kind of run ends well, and what it cost the device and the bus."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.accelerator.conftest import EVALUATE, SELECT, Job, Ran
from tests.script import assert_same_weights, losses


pytestmark = pytest.mark.slow

SHORT = "--seed 0 --report_to none --max_train_steps 4 --train_batch_size 2 --skip_final_inference"
SKIP = f"{SHORT} --skip_blocks 3,6"
ONE_STRETCH = f"{SKIP} --no-refresh_residuals"

JOBS = {
    "main": Job(
        "--seed 0 --max_train_steps 4 --train_batch_size 2 --skip_blocks auto --report_to tensorboard "
        "--validation_prompt dog --validation_epochs 1 --num_validation_images 1"
    ),
    "checkpointing": Job(f"{SKIP} --mixed_precision bf16 --gradient_checkpointing"),
    "nf4": Job(f"{SKIP} --mixed_precision bf16 --quantization nf4"),
    "int8": Job(f"{SKIP} --mixed_precision bf16 --quantization int8"),
    "online": Job(f"{SKIP} --residuals online"),
    "text": Job(f"{SKIP} --train_text_encoder"),
    "prior": Job(f"{SKIP} --with_prior_preservation --class_prompt dog --num_class_images 2 --class_data_dir {{prior-class}}"),
    "whole": Job(f"{ONE_STRETCH} --checkpointing_steps 2"),
    "search": Job(
        "--prompts dog --seeds 0 --encoder offline --resolution 64 --num_inference_steps 1 --search_stride 9 "
        "--window_lengths --no_cache",
        SELECT,
    ),
    "evaluation": Job(
        "--encoders offline --seeds 0 --num_inference_steps 1 --resolution 64 --subject dog --lora_weights {whole}",
        EVALUATE,
    ),
}  # fmt: skip

Run = Callable[[str, Job], Ran]


@pytest.fixture(params=[name for name in JOBS if name != "evaluation"])
def ran(request: pytest.FixtureRequest, run: Run) -> Ran:
    """Each run in turn."""
    return run(request.param, JOBS[request.param])


def test_every_run_ends_well_and_leaves_nothing_on_the_device(ran: Ran) -> None:
    assert ran.code == 0, ran.said[-2000:]
    # Quantised layers of bitsandbytes leave a table of their number format.
    assert ran.left_bytes <= 2048
