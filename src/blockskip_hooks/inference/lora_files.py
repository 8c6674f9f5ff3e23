"""LoRAs of others' making on a whole model that makes images: found, checked, loaded and taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging

from ..families import Family
from ..loading.lora_files import WEIGHTS_NAME
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError


def lora_file(path: Path) -> Path:
    """The weight file that ``--lora_weights`` names by itself or by its folder.

    Raises:
        UserError: if there is none.
    """
    file = path if path.is_file() else path / WEIGHTS_NAME
    if not file.is_file():
        raise UserError(f"--lora_weights {path} is no file, nor a folder with {WEIGHTS_NAME}; correct it.")
    return file


def changes_text(family: Family, lora: Path) -> bool:
    """Whether a LoRA has weights of text encoders, so that prompts have to be encoded with it."""
    prefixes = tuple(f"{name}." for name in family.trained_text_components)
    return bool(prefixes) and any(name.startswith(prefixes) for name in _lora_state(family, lora)[0])


def _lora_state(family: Family, lora: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """A LoRA's weights by their names in diffusers, and its metadata."""
    pipeline_class: Any = family.pipeline_class
    with quiet_adapters():
        state, metadata = pipeline_class.lora_state_dict(
            str(lora.parent), weight_name=lora.name, return_lora_metadata=True, use_safetensors=True
        )
    return state, metadata


def load_text_adapters(family: Family, pipeline: DiffusionPipeline, lora: Path) -> None:
    """Load what a LoRA has for the text encoders of a text pipeline."""
    state, metadata = _lora_state(family, lora)
    stock: Any = pipeline
    for name in family.trained_text_components:
        if any(key.startswith(f"{name}.") for key in state):
            with quiet_adapters():
                stock.load_lora_into_text_encoder(
                    state, network_alphas=None, text_encoder=getattr(stock, name), prefix=name, metadata=metadata
                )


def load_adapter(family: Family, transformer: ModelMixin, vae: ModelMixin, lora: Path, name: str) -> None:
    """Load a LoRA into a transformer as the stock pipeline does.

    Args:
        family: The model's family.
        transformer: The transformer.
        vae: The VAE, which the pipeline wants.
        lora: The LoRA's file or folder.
        name: What the adapter is called.

    Raises:
        UserError: if it is the LoRA of another model.
    """
    pipeline: Any = family.image_pipeline(transformer, vae)
    # It holds no text encoder that could take its part; prompts are encoded elsewhere.
    pipeline.load_lora_into_text_encoder = lambda *_, **__: None
    # A path to a file is read from its folder: not every reader of diffusers takes a file.
    source = {"weight_name": lora.name} if lora.is_file() else {}
    try:
        with quiet_adapters():
            pipeline.load_lora_weights(
                lora.parent if lora.is_file() else lora, adapter_name=name, use_safetensors=True, **source
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise _other_model(lora) from error
    if name not in getattr(transformer, "peft_config", {}):
        raise _other_model(lora)


def _other_model(lora: Path) -> UserError:
    return UserError(f"--lora_weights {lora} does not fit this model; name a LoRA that was trained on it.")


@contextmanager
def with_adapter(family: Family, model: DiTBlockSkipTransformer, vae: ModelMixin, lora: Path | None) -> Iterator[None]:
    """Within this context a LoRA, if any, takes part in the images; after it the model is what it was."""
    if lora is None:
        yield
        return
    transformer: Any = model.transformer
    load_adapter(family, transformer, vae, lora, "evaluated")
    try:
        yield
    finally:
        transformer.unload_lora()


@contextmanager
def quiet_adapters() -> Iterator[None]:
    """Within this context nobody is warned of adapters that share a model, or of text encoders that are not there."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
