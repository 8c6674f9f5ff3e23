"""The library names its arguments in errors; people who run a script know them as flags."""

from __future__ import annotations

import re


# What the library calls its arguments, and the flags that give them.
_FLAGS = {
    r"BlockSkipConfig\(leading=(\d+), trailing=(\d+)\)": r"--skip_blocks \1,\2",
    r"BlockSkipConfig\.residuals\b": "--residuals",
    r"DiTBlockSkipTransformer\.quantization\b": "--quantization",
    r"^The model names the class": "--pretrained_model_name_or_path: the model names the class",
    r"PatchSamplingConfig\.mode\b": "--patch_sampling",
    r"PatchSamplingConfig\.positions\b": "--patch_positions",
    r"PatchSamplingConfig\.(min|max)_size\b": r"--\1_patch_size",
    r"PatchSamplingConfig\.buckets\b": "--aspect_ratio_buckets",
    r"lora_targets\.(layers|blocks)\b": r"--lora_\1",
    r"select_blocks\.skip_blocks\b": "--skip_blocks",
}


def with_flags(text: str) -> str:
    """An error of the library in a script's words: its arguments by the flags that give them."""
    for argument, flag in _FLAGS.items():
        text = re.sub(argument, flag, text)
    return text
