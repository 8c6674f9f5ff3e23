"""Model families. The only place in the package that knows a model's name.

A new family is one file here and one line in ``_REGISTRY``. A family's file is imported when the family is asked for,
and a class of diffusers when the family uses it, so that one that diffusers renamed concerns its own family only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..layouts import TransformerLayout, announce_transformer
from ..utils.errors import UserError


if TYPE_CHECKING:
    from .base import Family
    from .facts import ComfyUIFormat, Flag, PromptEmbeds


class _Entry(NamedTuple):
    """Where a family is: the file in this folder, the class in it, and the class of its transformers in diffusers."""

    file: str
    family: str
    transformer: str

    def load(self) -> type[Family]:
        return getattr(import_module(f".{self.file}", __name__), self.family)

    def layout(self) -> TransformerLayout:
        family = self.load()
        return TransformerLayout(family.block_stacks, family.block_layouts, family.idle_modules)


_REGISTRY = {
    "FluxPipeline": _Entry("flux", "Flux", "FluxTransformer2DModel"),
    "FluxKontextPipeline": _Entry("flux", "FluxKontext", "FluxTransformer2DModel"),
    "Flux2Pipeline": _Entry("flux2", "Flux2", "Flux2Transformer2DModel"),
    "Flux2KleinPipeline": _Entry("flux2", "Flux2Klein", "Flux2Transformer2DModel"),
    "Flux3ModularPipeline": _Entry("flux3", "Flux3", "Flux3Transformer2DModel"),
    "StableDiffusion3Pipeline": _Entry("sd3", "StableDiffusion3", "SD3Transformer2DModel"),
    "ZImagePipeline": _Entry("z_image", "ZImage", "ZImageTransformer2DModel"),
    "Krea2Pipeline": _Entry("krea2", "Krea2", "Krea2Transformer2DModel"),
    "SanaPipeline": _Entry("sana", "Sana", "SanaTransformer2DModel"),
    "SanaSprintPipeline": _Entry("sana", "SanaSprint", "SanaTransformer2DModel"),
    "HiDreamImagePipeline": _Entry("hidream", "HiDream", "HiDreamImageTransformer2DModel"),
    "QwenImagePipeline": _Entry("qwen_image", "QwenImage", "QwenImageTransformer2DModel"),
    "QwenImage21Pipeline": _Entry("qwen_image_21", "QwenImage21", "QwenImage21Transformer2DModel"),
    "Lumina2Pipeline": _Entry("lumina2", "Lumina2", "Lumina2Transformer2DModel"),
    "PixArtSigmaPipeline": _Entry("pixart_sigma", "PixArtSigma", "PixArtTransformer2DModel"),
    "Ideogram4Pipeline": _Entry("ideogram4", "Ideogram4", "Ideogram4Transformer2DModel"),
}

for _entry in _REGISTRY.values():
    announce_transformer(_entry.transformer, _entry.layout)


class _Families(Mapping[str, "type[Family]"]):
    """The families of ``_REGISTRY``, each imported when it is asked for."""

    def __getitem__(self, pipeline: str) -> type[Family]:
        return _REGISTRY[pipeline].load()

    def __contains__(self, pipeline: object) -> bool:
        return pipeline in _REGISTRY

    def __iter__(self) -> Iterator[str]:
        return iter(_REGISTRY)

    def __len__(self) -> int:
        return len(_REGISTRY)


FAMILIES: Mapping[str, type[Family]] = _Families()
"""Family by the pipeline class that a model's ``model_index.json`` or ``modular_model_index.json`` names."""


def detect_family(model_path: Path) -> type[Family]:
    """The family of a pipeline folder.

    Raises:
        UserError: if the folder is not a pipeline, if no family supports the pipeline, or if the installed diffusers
            does not have it.
    """
    where = f"--pretrained_model_name_or_path {model_path}"
    from ..loading.component_config import is_absent, read_index  # imports diffusers, which the package does without

    try:
        index = read_index(model_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where} is not a diffusers pipeline: model_index.json cannot be read ({type(error).__name__})."
        ) from error
    pipeline = str(index.get("_class_name"))
    if pipeline not in FAMILIES:
        raise UserError(f"{where} is a {pipeline}; supported are {', '.join(FAMILIES)}.")
    family = FAMILIES[pipeline]
    optional = {name for name in family.optional_components if is_absent(index, name)}
    components = {"transformer", "vae", "scheduler", *family.text_components} - optional
    missing = sorted(name for name in components if not (model_path / name).is_dir())
    if missing:
        raise UserError(f"{where} lacks the folder(s) {', '.join(missing)}.")
    family.find_pipeline_class()
    return family


def unread_components(pipeline: str) -> set[str]:
    """Components that neither training nor images load, by the name of the pipeline's class."""
    family = FAMILIES.get(pipeline)
    return set(family.unused_components) - set(family.image_components) if family else set()


_LAZY = {"ComfyUIFormat": "facts", "Family": "base", "Flag": "facts", "PromptEmbeds": "facts"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


__all__ = ["FAMILIES", "ComfyUIFormat", "Family", "Flag", "PromptEmbeds", "detect_family", "unread_components"]
