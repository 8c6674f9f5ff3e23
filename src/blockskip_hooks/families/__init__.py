"""Model families. The only place in the package that knows a model's name.

A new family is one file here and one line in :data:`FAMILIES`.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch

from .base import ComfyUIFormat, Family, Flag, PromptEmbeds
from .flux import Flux
from .flux2 import Flux2, Flux2Klein
from .hidream import HiDream
from .ideogram4 import Ideogram4
from .krea2 import Krea2
from .lumina2 import Lumina2
from .pixart_sigma import PixArtSigma
from .qwen_image import QwenImage
from .sana import Sana, SanaSprint
from .sd3 import StableDiffusion3
from .z_image import ZImage


FAMILIES: dict[str, type[Family]] = {
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "ZImagePipeline": ZImage,
    "Krea2Pipeline": Krea2,
    "SanaPipeline": Sana,
    "SanaSprintPipeline": SanaSprint,
    "HiDreamImagePipeline": HiDream,
    "QwenImagePipeline": QwenImage,
    "Lumina2Pipeline": Lumina2,
    "PixArtSigmaPipeline": PixArtSigma,
    "Ideogram4Pipeline": Ideogram4,
}
"""Family by the pipeline class that a model's ``model_index.json`` names."""


def detect_family(model_path: Path) -> type[Family]:
    """The family of a pipeline folder.

    Raises:
        ValueError: if the folder is not a pipeline, or one of no supported family.
    """
    index_file = model_path / "model_index.json"
    try:
        index = json.loads(index_file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {model_path} is not a diffusers pipeline: {index_file.name} cannot be "
            f"read ({type(error).__name__})."
        ) from error
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    if pipeline not in FAMILIES:
        raise ValueError(
            f"--pretrained_model_name_or_path {model_path} is a {pipeline}; supported are {', '.join(FAMILIES)}."
        )
    optional = set(FAMILIES[pipeline].absent_components(index))
    components = {"transformer", "vae", "scheduler", *FAMILIES[pipeline].text_components} - optional
    missing = sorted(name for name in components if not (model_path / name).is_dir())
    if missing:
        raise ValueError(f"--pretrained_model_name_or_path {model_path} lacks the folder(s) {', '.join(missing)}.")
    return FAMILIES[pipeline]


def block_stacks_of(transformer: torch.nn.Module) -> tuple[str, ...] | None:
    """The stacks of a transformer that are blocks, where its family says so; see ``Family.block_stacks``."""
    for family in FAMILIES.values():
        if family.block_stacks is not None:
            parameters = inspect.signature(family.pipeline_class.__init__).parameters
            if isinstance(transformer, parameters["transformer"].annotation):
                return family.block_stacks
    return None


__all__ = ["FAMILIES", "ComfyUIFormat", "Family", "Flag", "PromptEmbeds", "block_stacks_of", "detect_family"]
