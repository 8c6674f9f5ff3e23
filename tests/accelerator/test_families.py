"""A tiny pipeline of every family on a device that is not the CPU: it ends as planned and leaves nothing there."""

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
# Tensors of a few numbers take a multiple of 512 bytes each.
ROUNDING = 2**15


def test_a_tiny_pipeline_runs_as_planned(tiny: TinyFamily, run: Callable[[str, Job], Ran], once: Any, shared: Path):
    once("tiny-photos", lambda folder: script.save_photos(folder, [(160, 128), (128, 128)]))
    sizes: dict[str, Any] = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    words = script.settings(tiny.folder, shared / "tiny-photos", Path("left-out"), *_further(tiny), **sizes)
    place = words.index("--output_dir")
    ran = run(f"family-{tiny.name}", Job(shlex.join(words[:place] + words[place + 2 :])))
    print(ran.peaks(), ran.left_bytes)
    assert ran.code == 0, ran.said[-2000:]
    assert ran.left_bytes == 0
    off = {
        stage: f"{measured:,} of {planned:,} bytes"
        for stage, (measured, planned) in ran.peaks().items()
        if abs(measured - planned) > max(TOLERANCE * planned, ROUNDING)
    }
    assert off == {}


def _further(tiny: TinyFamily) -> list[str]:
    own = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]
    return [
        *own,
        "--skip_blocks",
        "1,2",
        "--mixed_precision",
        "bf16",
        "--max_train_steps",
        "2",
        "--skip_final_inference",
    ]
