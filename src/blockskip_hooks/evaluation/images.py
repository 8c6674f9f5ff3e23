"""The images of an evaluation: every prompt with every seed, for each LoRA; finished ones are kept as files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..inference.generate import generate_images
from ..inference.lora_files import changes_text, with_adapter
from ..inference.streamed_model import (
    ImageSettings,
    describe_images,
    encode_for_images,
    images_at_once,
    load_image_transformer,
)
from ..utils.digests import file_digest, fingerprint
from ..utils.files import replacing
from ..utils.progress import progress_bar
from .prompt_lists import EvaluationPrompt


BASE_NAME = "base"
_NAME_LENGTH = 60


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is to be evaluated.

    Attributes:
        settings: The model and its images.
        prompts: Prompts.
        seeds: Seeds of the images of each prompt, the same for every prompt and LoRA.
        loras: Weight file by name; ``None`` is the model without a LoRA.
        folder: Where images are kept.
        batch_size: Images in one forward; ``None`` for what their size suggests.
    """

    settings: ImageSettings
    prompts: tuple[EvaluationPrompt, ...]
    seeds: tuple[int, ...]
    loras: Mapping[str, Path | None]
    folder: Path
    batch_size: int | None = None

    def image_files(self, name: str) -> dict[tuple[str, int], Path]:
        """The file of each prompt and seed; other settings, weights or another LoRA have another folder."""
        lora, settings = self.loras[name], self.settings
        described: dict[str, Any] = describe_images(settings.family, settings.pipeline_kwargs, settings.dtype)
        described["lora"] = None if lora is None else file_digest(lora)
        # Names have a folder in front where they are alike; an image is found with and without.
        folder = self.folder / "images" / f"{_plain(name.rpartition('/')[2])}-{fingerprint(described)[:16]}"
        return {
            (prompt.text, seed): folder / f"{_plain(prompt.text)}-{_digest(prompt.text)}-seed{seed}.png"
            for prompt in self.prompts
            for seed in self.seeds
        }


def _plain(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:_NAME_LENGTH]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def count_missing(request: EvaluationRequest) -> int:
    """How many images are not finished yet."""
    return sum(not file.is_file() for name in request.loras for file in request.image_files(name).values())


def make_images(request: EvaluationRequest) -> None:
    """Make and save what is missing; without anything missing no model is loaded.

    Raises:
        UserError: if a LoRA is that of another model.
    """
    missing = {
        name: {key: file for key, file in request.image_files(name).items() if not file.is_file()}
        for name in request.loras
    }
    missing = {name: files for name, files in missing.items() if files}
    if not missing:
        return
    settings, family = request.settings, request.settings.family
    dtype, device = settings.dtype, settings.device
    texts = [prompt.text for prompt in request.prompts]
    plain = encode_for_images(family, texts, settings.pipeline_kwargs, dtype=dtype, device=device)
    encoded = dict.fromkeys(missing, plain)
    for name in missing:
        lora = request.loras[name]
        if lora is not None and changes_text(family, lora):
            encoded[name] = encode_for_images(
                family, texts, settings.pipeline_kwargs, dtype=dtype, device=device, lora=lora
            )
    takes_lora = any(request.loras[name] for name in missing)
    model = load_image_transformer(family, dtype=dtype, device=device, takes_lora=takes_lora)
    vae = family.load_vae(dtype, device)
    at_once = images_at_once(settings.pipeline_kwargs, request.batch_size)
    with closing(progress_bar("Images", sum(map(len, missing.values())), "image")) as bar:
        for name, files in missing.items():
            embeds, negative = encoded[name]
            bar.set_postfix_str(name)
            with with_adapter(family, model, vae, request.loras[name]):
                for text, seeds in _batches(list(files), at_once):
                    (images,) = generate_images(
                        [embeds[text]],
                        family=family,
                        model=model,
                        vae=vae,
                        negative=negative,
                        seeds=seeds,
                        pipeline_kwargs=settings.pipeline_kwargs,
                    )
                    for seed, image in zip(seeds, images, strict=True):
                        _save(image, files[text, seed])
                    bar.update(len(images))


def _batches(keys: Sequence[tuple[str, int]], size: int) -> list[tuple[str, list[int]]]:
    """Prompts and some seeds of each, at most ``size``."""
    seeds: dict[str, list[int]] = {}
    for text, seed in keys:
        seeds.setdefault(text, []).append(seed)
    return [
        (text, numbers[start : start + size])
        for text, numbers in seeds.items()
        for start in range(0, len(numbers), size)
    ]


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        image.save(temporary, format="PNG")
