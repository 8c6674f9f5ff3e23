"""A tiny pipeline of every family on a device that is not the CPU: it ends well, as planned, and leaves nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import script
from tests.accelerator.conftest import Job, Ran
from tests.tiny import TINY_FAMILIES, TinyFamily


pytestmark = pytest.mark.slow

TOLERANCE = 0.1
# Tensors of a few numbers take a multiple of 512 bytes each, and CLIP is planned for prompts of its full length, which
# HiDream's pipeline does without.
ROUNDING = 2**15
# diffusers keeps what it has computed of rotary embeddings, two tables of 4096 positions and those of an image, until
# the process ends: 4 MiB with heads of the released width.
KEPT_BY_DIFFUSERS = {"qwen-image": 8 * 8 * (2 * 4096 + 16)}
# Rotary tables of 9216 positions that diffusers moves to the device with the model: 4.5 MiB at full width.
TABLES = {"qwen-image-2.1": 9216 * 8 * 8}
# Plans are for prompts of the greatest length. These pipelines refuse longer ones, or encode them to their ends.
TOKENS_OF_PROMPT = {"ideogram4": 13, "qwen-image": 10, "qwen-image-2.1": 13}


@pytest.fixture
def train(run: Callable[[str, Job], Ran], once: Any, shared: Path) -> Callable[..., Ran]:
    """Train on a tiny pipeline in half precision."""

    def start(tiny: TinyFamily, *flags: str, **settings: Any) -> Ran:
        once("tiny-photos", lambda folder: script.save_photos(folder, [(160, 128), (128, 128)]))
        sizes: dict[str, Any] = {"resolution": tiny.resolution}
        sizes["text_tokens"] = TOKENS_OF_PROMPT.get(tiny.name, tiny.text_tokens)
        folders = tiny.folder, shared / "tiny-photos", Path("left-out")
        words = script.settings(*folders, *_further(tiny), *flags, **sizes)
        place = words.index("--output_dir")
        name = "-".join(["family", tiny.name, *flags])
        return run(name.replace("--", ""), Job(shlex.join(words[:place] + words[place + 2 :]), **settings))

    return start


def assert_as_planned(ran: Ran, left_bytes: int = 0, tables: int = 0) -> None:
    assert ran.code == 0, ran.said[-2000:]
    assert ran.left_bytes == left_bytes
    peaks = {
        stage: (measured, planned + (tables if stage != "encode" else 0))
        for stage, (measured, planned) in ran.peaks().items()
    }
    off = {
        stage: f"{measured:,} of {planned:,} bytes"
        for stage, (measured, planned) in peaks.items()
        if abs(measured - planned) > max(TOLERANCE * planned, ROUNDING)
    }
    assert off == {}


def test_a_tiny_pipeline_runs_as_planned(tiny: TinyFamily, train: Callable[..., Ran]) -> None:
    ran, name = train(tiny, "--mixed_precision", "bf16"), tiny.name
    assert_as_planned(ran, KEPT_BY_DIFFUSERS.get(name, 0), TABLES.get(name, 0))


def test_in_half_precision_gradients_are_scaled_and_the_scaler_is_in_checkpoints(train: Callable[..., Ran]) -> None:
    tiny = TINY_FAMILIES[0]
    # accelerate has a list of devices that compute in float16.
    ran = train(tiny, "--mixed_precision", "fp16", "--checkpointing_steps", "1", device="musa")
    assert_as_planned(ran)
    scalers = [
        json.loads((ran.folder / f"checkpoint-{step}" / "training_state.json").read_text())["grad_scaler"]
        for step in (1, 2)
    ]
    assert all(scaler["scale"] >= 2**10 for scaler in scalers)
    # Steps without an overflow since the last one.
    assert [scaler["_growth_tracker"] for scaler in scalers] == [1, 2]


def _further(tiny: TinyFamily) -> list[str]:
    own = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]
    times = 1 if tiny.name in TOKENS_OF_PROMPT else tiny.text_tokens
    own += ["--instance_prompt", " ".join([script.PROMPT] * times), "--skip_final_inference"]
    return [*own, "--skip_blocks", "1,2", "--max_train_steps", "2"]
