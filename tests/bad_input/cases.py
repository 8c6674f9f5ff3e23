"""Tables of bad input: what is wrong, in which flags or files, and the words that the one line of error must have.

A value of a flag that is a function makes the broken thing in a fresh folder and returns its path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


Make = Callable[[Path], Any]
Case = tuple[dict[str, Any], list[str]]

MODEL, PHOTOS, OUT = "--pretrained_model_name_or_path", "--instance_data_dir", "--output_dir"
TRANSFORMER = "diffusion_pytorch_model"


class Harmful:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))
