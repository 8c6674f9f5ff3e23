"""``blockskip doctor``: what this machine has, what of it was tested, and what fits."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants, get_token

from ..utils.files import existing_parent
from ..utils.formatting import format_bytes
from ..utils.machine import version_of
from ..version import __version__
from .console import shipped
from .startup import make_parser


TESTED = {
    "python": "3.11",
    "torch": "2.13",
    "diffusers": "0.42",
    "transformers": "5.23",
    "accelerate": "1.15",
    "peft": "0.21",
}
"""Versions that all tests were run with."""
OPTIONAL = {
    "bitsandbytes": "--quantization nf4, --use_8bit_adam",
    "torchao": "--quantization int8",
    "prodigyopt": "--optimizer prodigy",
    "pillow-heif": "HEIC photos",
    "wandb": "--report_to wandb",
    "torchvision": "the text processors of FLUX.2-dev and Qwen-Image 2.1",
}
SIZES = (6, 8, 12, 16, 24)
"""Gigabytes of the cards that FLUX.1-dev has a recipe for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print all of it; the exit code is 0."""
    make_parser(__doc__).parse_args(argv)
    memory = gpu_memory()
    for title, lines in (
        ("Machine", machine_lines()),
        ("Packages", package_lines()),
        ("Tested", tested_lines()),
        ("Fits", fitting_lines(memory, multiplies_bf16())),
    ):
        print("\n".join([title, *(f"  {line}" for line in lines)]))
    return 0


def gpu_memory() -> int | None:
    """Bytes of the accelerator that a run would use; ``None`` without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def multiplies_bf16() -> bool:
    """Whether the accelerator, if there is one, has bf16 in hardware; cards before Ampere, such as a T4, do not."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def machine_lines() -> list[str]:
    """Devices, memory, disk, and whether the hub knows this person."""
    memory, folder = psutil.virtual_memory(), Path(constants.HF_HUB_CACHE)
    devices = [
        f"{properties.name}, {format_bytes(properties.total_memory)}"
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    other = torch.accelerator.current_accelerator(check_available=True)  # mps on a Mac
    used = other.type if other else "the CPU"
    offline = " (offline: HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    login = "a token is stored" if get_token() else "not logged in; gated models need: hf auth login"
    return [
        f"devices   {'; '.join(devices) or f'no CUDA device; runs use {used}'}",
        f"memory    {format_bytes(memory.total)}, of which {format_bytes(memory.available)} are free",
        f"disk      {format_bytes(shutil.disk_usage('.').free)} free here, "
        f"{format_bytes(shutil.disk_usage(existing_parent(folder)).free)} where models are kept ({folder})",
        f"system    {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        f"hub       {login}{offline}",
    ]


def package_lines() -> list[str]:
    """Versions here beside those that were tested, and what optional packages are for."""
    lines = [f"{'blockskip-hooks':<15} {__version__}"]
    for name, tested in TESTED.items():
        here = platform.python_version() if name == "python" else version_of(name) or "missing"
        same = re.match(rf"{re.escape(tested)}(\.|$|\+)", here)
        lines.append(f"{name:<15} {here:<12} {'as tested' if same else f'tested with {tested}'}")
    for name, use in OPTIONAL.items():
        found = version_of(name)
        lines.append(f"{name:<15} {found or 'missing':<12} for {use}" + ("" if found else f": pip install {name}"))
    return lines


def tested_lines() -> list[str]:
    """What stands behind a run on this machine's device."""
    return [
        "on a CPU: every stage and family on small pipelines; the embedded model, trained and measured",
        "on a GPU: nothing yet; memory of real models is simulated, times are estimated (docs/time.md)",
    ]


def fitting_lines(memory: int | None, bf16: bool = True) -> list[str]:
    """The recipe of FLUX.1-dev that a card has room for, and how to ask for other models.

    Args:
        memory: Bytes of the card; ``None`` without one.
        bf16: Whether it has bf16 in hardware.
    """
    # A line can be copied whole: a shell leaves out what is behind the #.
    lines = ["blockskip train --skip_blocks auto  # the embedded model, on any machine"]
    # A card of 16 GB says 15.8e9 bytes, one of 12 GB says 12.6e9.
    gigabytes = 0 if memory is None else round(memory / 1e9)
    if (size := max((size for size in SIZES if size <= gigabytes), default=None)) is not None:
        recipe = shipped(f"configs/flux-{size}gb.yaml")
        what = recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        precision = "" if bf16 else " --mixed_precision fp16"
        lines += [f"blockskip train --config {recipe}{precision}", f"  {what} Simulated."]
        if not bf16:
            lines.append("  This card has bf16 in software only, which is slow, so fp16 stands in the recipe's place.")
    card = f"{size or 12}GB"
    return [*lines, f"blockskip plan --preset flux.1-dev --gpu {card}  # other models: blockskip plan --help"]
