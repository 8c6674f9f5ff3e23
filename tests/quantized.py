"""Tiny models that are wide enough to be quantised, the ways to quantise them, and runs of the script on them."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from blockskip_hooks import BlockSkipConfig
from blockskip_hooks.loading.quantization import QuantizationConfig
from tests import script
from tests.tiny import TINY_FAMILIES, TinyFamily, randomise


def widened(name: str, **changes: Any) -> TinyFamily:
    """A tiny pipeline whose blocks are as wide as a block of 4-bit weights, a few times over."""
    tiny = next(tiny for tiny in TINY_FAMILIES if tiny.name == name)

    def save(folder: Path) -> None:
        shutil.copytree(tiny.folder, folder)
        transformer = tiny.make_transformer()
        torch.manual_seed(0)
        wide = type(transformer).from_config({**transformer.config, **changes})
        shutil.rmtree(folder / "transformer")
        randomise(wide).save_pretrained(folder / "transformer")

    return dataclasses.replace(tiny, name=f"{name}-wide", save=save)


FLUX = widened("flux-dev", num_attention_heads=8)
SANA = widened(
    "sana",
    num_attention_heads=8,
    attention_head_dim=16,
    num_cross_attention_heads=8,
    cross_attention_head_dim=16,
    cross_attention_dim=128,
)


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


CONFIGS = {
    "nf4": QuantizationConfig.named("nf4"),
    "int8": QuantizationConfig.named("int8"),
    "bitsandbytes-int8": QuantizationConfig(library="bitsandbytes", bits=8),
    "fp4-double": QuantizationConfig(library="bitsandbytes", bits=4, quant_type="fp4", double_quant=True),
}
SLOW = {"bitsandbytes-int8", "fp4-double"}
ALL = [
    pytest.param(config, id=name, marks=[needs(config.library), *[pytest.mark.slow] * (name in SLOW)])
    for name, config in CONFIGS.items()
]
METHODS = [
    pytest.param("nf4", marks=needs("bitsandbytes")),
    pytest.param("int8", marks=needs("torchao")),
]
SPANS = BlockSkipConfig(leading=1, trailing=2)
FLAGS = ("--skip_blocks", "1,2", "--gradient_checkpointing", "--upcast_before_saving", "--checkpointing_steps", "2")


def run_script(tiny: TinyFamily, photos: Path, output: Path, *flags: str) -> Path:
    extra = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]
    sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    return script.train(tiny.folder, photos, output, *extra, *FLAGS, *flags, **sizes)
