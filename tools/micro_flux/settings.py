# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""Arguments and helpers that every stage shares."""

import argparse
import json
import os
from pathlib import Path

import torch


REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "src" / "blockskip_hooks" / "assets"
IMAGE_SIZE = 128


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --icons, --work, --seed and --threads."""
    parser.add_argument(
        "--icons",
        type=Path,
        default=Path(__file__).parent / "node_modules" / "@iconify-json",
        help="folder of the icon packages (after `npm install` in this folder)",
    )
    parser.add_argument("--work", type=Path, default=Path("micro_flux_work"), help="folder of intermediate files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def write_json(path: Path, value: object) -> None:
    """Writes JSON so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
