"""A tiny pipeline of every family on a device that is not the CPU: it ends well, as planned, and leaves nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import script
from tests.accelerator.conftest import Job, Ran
from tests.tiny import TinyFamily


pytestmark = pytest.mark.slow

TOLERANCE = 0.1
# Tensors of a few numbers take a multiple of 512 bytes each, and text encoders are planned with a cache of keys and
# values that some pipelines go without.
ROUNDING = 2**15
# diffusers keeps what it has computed of rotary embeddings, two tables of 4096 positions and those of an image, until
# the process ends: 4 MiB with heads of the released width.
KEPT_BY_DIFFUSERS = {"qwen-image": 8 * 8 * (2 * 4096 + 16)}
# Plans are for prompts of the greatest length. These pipelines refuse longer ones, or encode them to their ends.
TOKENS_OF_PROMPT = {"ideogram4": 13, "qwen-image": 10}


def test_a_tiny_pipeline_runs_as_planned(tiny: TinyFamily, run: Callable[[str, Job], Ran], once: Any, shared: Path):
    once("tiny-photos", lambda folder: script.save_photos(folder, [(160, 128), (128, 128)]))
    tokens = TOKENS_OF_PROMPT.get(tiny.name, tiny.text_tokens)
    sizes: dict[str, Any] = {"resolution": tiny.resolution, "text_tokens": tokens}
    words = script.settings(tiny.folder, shared / "tiny-photos", Path("left-out"), *_further(tiny), **sizes)
    place = words.index("--output_dir")
    ran = run(f"family-{tiny.name}", Job(shlex.join(words[:place] + words[place + 2 :])))
    assert ran.code == 0, ran.said[-2000:]
    assert ran.left_bytes == KEPT_BY_DIFFUSERS.get(tiny.name, 0)
    off = {
        stage: f"{measured:,} of {planned:,} bytes"
        for stage, (measured, planned) in ran.peaks().items()
        if abs(measured - planned) > max(TOLERANCE * planned, ROUNDING)
    }
    assert off == {}


def _further(tiny: TinyFamily) -> list[str]:
    own = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]
    times = 1 if tiny.name in TOKENS_OF_PROMPT else tiny.text_tokens
    own += ["--instance_prompt", " ".join([script.PROMPT] * times), "--skip_final_inference"]
    return [*own, "--skip_blocks", "1,2", "--mixed_precision", "bf16", "--max_train_steps", "2"]
