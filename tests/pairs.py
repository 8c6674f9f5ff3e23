"""Photos with condition images, the tiny models that take them, their inputs, and runs of the script on both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from blockskip_hooks.families import Family
from tests import script
from tests.script import PROMPT, save_photos
from tests.tiny import TINY_FAMILIES, TinyFamily


SIZES = [(160, 128), (128, 128), (128, 192)]
PAIRED = [tiny for tiny in TINY_FAMILIES if tiny.name in ("flux-kontext", "flux2-dev", "flux2-klein")]
KONTEXT = next(tiny for tiny in PAIRED if tiny.name == "flux-kontext")
VALIDATION = ("--validation_prompt", f"{PROMPT} on the beach", "--num_validation_images", "1")


def save_pairs(folder: Path, conditions: Path | None = None) -> Path:
    """Noise pictures, and their negatives as condition images beside them or in a folder of their own."""
    save_photos(folder, SIZES)
    (conditions or folder).mkdir(exist_ok=True)
    for number in range(len(SIZES)):
        name = f"{number}.png" if conditions else f"{number}_cond.png"
        with Image.open(folder / f"{number}.png") as image:
            ImageOps.invert(image).save((conditions or folder) / name)
    return folder


def train(tiny: TinyFamily, photos: Path, output: Path, *flags: str) -> Path:
    settings = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    return script.train(tiny.folder, photos, output, "--cond_data_dir", str(photos), *flags, **settings)


def condition_inputs(tiny: TinyFamily, batch_size: int = 2) -> tuple[Family, dict[str, Any], int]:
    """The family, arguments of the transformer with a condition image larger than the image, and its tokens."""
    family, inputs = tiny.make_family(), tiny.make_inputs(batch_size)
    side = 3 * family.latent_token_size
    condition = torch.randn((batch_size, *family.latent_shape(side, side)), generator=torch.Generator().manual_seed(2))
    return family, family.with_condition(inputs, condition), 9


def assert_same_gradients(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert expected and expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-12), name


def image_tokens(prediction: torch.Tensor) -> torch.Tensor:
    return prediction[:, :4]
