"""Encoders that say how alike two images are: DINO, DINOv2, CLIP, and two that need no download."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ..embedded import embedded_model
from ..utils.errors import UserError, first_line
from .subject_encoder import SubjectEncoder


DEFAULT_ENCODER = "facebook/dino-vits16"
"""DINO ViT-S/16, which the paper measures with."""

ENCODER_NAMES = {"dino": DEFAULT_ENCODER, "clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-base"}
"""Short names of hub ids."""

FEATURE_LAYERS = 5
"""Depths of a pretrained encoder at which its spatial features are taken."""

OFFLINE_SIDE, OFFLINE_CELLS, OFFLINE_BINS = 64, 8, 8


class ImageEncoder(ABC):
    """Turns images into vectors whose dot product says how alike they are.

    Attributes:
        name: What it is called in results.
        reads_text: Whether it embeds prompts in the same space as images.
        quality: How good it is itself and where that is written; ``None`` for those that others have measured.
    """

    name: str
    reads_text: bool = False
    quality: str | None = None

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image], batch_size: int = 32) -> torch.Tensor:
        """Embeddings ``(N, D)`` of length 1, float32 on the CPU.

        Args:
            images: N images of any mode and size, at least one.
            batch_size: Images in one forward.
        """
        parts = [
            self._features([image.convert("RGB") for image in images[start : start + batch_size]])
            for start in range(0, len(images), batch_size)
        ]
        return F.normalize(torch.cat(parts).float().cpu(), dim=1)

    @torch.no_grad()
    def spatial_features(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Maps ``(N, C, H, W)`` at several depths, float32 on the CPU: what is seen where.

        Args:
            images: N images of any mode and size, at least one.
        """
        return [layer.float().cpu() for layer in self._layers([image.convert("RGB") for image in images])]

    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings ``(N, D)`` of prompts, like those of :meth:`embed`.

        Raises:
            UserError: if the encoder knows images only.
        """
        raise UserError(f"The image encoder {self.name} does not read text; one of CLIP's kind does.")

    @abstractmethod
    def _features(self, images: list[Image.Image]) -> torch.Tensor:
        """Vectors ``(N, D)`` of RGB images."""

    @abstractmethod
    def _layers(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Maps ``(N, C, H, W)`` of RGB images at several depths."""


class SubjectImageEncoder(ImageEncoder):
    """The encoder trained for the embedded model; it means nothing for other pictures.

    Attributes:
        classes: What it can tell apart.
    """

    name = "subject"

    def __init__(self) -> None:
        folder = embedded_model().parent / "subject_encoder"
        self._encoder = SubjectEncoder.from_pretrained(folder)
        self.classes = tuple(self._encoder.classes)
        measured = json.loads((folder / "config.json").read_text(encoding="utf-8"))["measured"]
        self.quality = (
            f"finds the right one among {measured['unseen_designs_of_the_classes']} designs that it never saw for "
            f"{measured['retrieval_among_designs_of_the_classes']:.1%} of their pictures and among "
            f"{measured['unseen_identities']:,} unseen icons for {measured['retrieval_among_all_unseen']:.1%}; class "
            f"right for {measured['class_accuracy']:.1%} and background for {measured['background_accuracy']:.1%} "
            "(blockskip_hooks/assets/MODEL_CARD.md, Measured quality)"
        )

    def classify(self, images: Sequence[Image.Image]) -> dict[str, list[str]]:
        """Names of the ``class`` and of the ``background`` of each image."""
        return self._encoder.classify(2 * _pixels([image.convert("RGB") for image in images], 64) - 1)

    def _features(self, images: list[Image.Image]) -> torch.Tensor:
        return self._encoder.embed(2 * _pixels(images, 64) - 1)

    def _layers(self, images: list[Image.Image]) -> list[torch.Tensor]:
        x, layers = 2 * _pixels(images, 64) - 1, []
        for stage in self._encoder.embedder.stages:
            x = stage(x)
            layers.append(x)
        return layers


class OfflineImageEncoder(ImageEncoder):
    """Colours and edges by place, without any training: for images that were made from the same noise.

    Such images keep their layout, so what a change does to them shows in the mean colours of a grid of cells and in
    histograms of the edges' directions there.
    """

    name = "offline"

    def _features(self, images: list[Image.Image]) -> torch.Tensor:
        colours, edges = (layer.flatten(1) for layer in self._layers(images))
        return torch.cat([F.normalize(colours, dim=1), F.normalize(edges, dim=1)], dim=1)

    def _layers(self, images: list[Image.Image]) -> list[torch.Tensor]:
        pixels = _pixels(images, OFFLINE_SIDE)
        cell = OFFLINE_SIDE // OFFLINE_CELLS
        grey = pixels.mean(1, keepdim=True)
        dx = F.pad(grey[..., :, 2:] - grey[..., :, :-2], (1, 1))
        dy = F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
        # An edge's direction without its sign; every bin is a map of edge strengths.
        bins = (torch.atan2(dy, dx).remainder(torch.pi) / torch.pi * OFFLINE_BINS).long() % OFFLINE_BINS
        strengths = F.one_hot(bins[:, 0], OFFLINE_BINS).movedim(-1, 1) * torch.hypot(dx, dy)
        # Cosines compare directions, so the mean of all natural colours must not be one.
        return [F.avg_pool2d(pixels, cell) - 0.5, F.avg_pool2d(strengths, cell)]


class PretrainedImageEncoder(ImageEncoder):
    """A vision model of transformers: the embedding of those that read text too, such as CLIP, else the class token.

    DINO's and DINOv2's class token is the one after the last layer and its normalisation.

    Args:
        source: Hub id or folder.
        device: Where it runs.
        others: Names of encoders that need no download, for the error.

    Raises:
        UserError: if it cannot be loaded.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", others: Sequence[str] = ()) -> None:
        self.name, self._device = str(source), device
        try:
            self._processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
            self._model: Any = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
            self._model = self._model.eval().to(device)
            self.reads_text = hasattr(self._model, "get_text_features")
            self._tokenizer = (
                AutoTokenizer.from_pretrained(source, trust_remote_code=False) if self.reads_text else None
            )
        except (OSError, ValueError) as error:
            known = " or ".join(("a folder", "a hub id that can be reached", *others))
            raise UserError(
                f"The image encoder {source} cannot be loaded ({first_line(error)}); name {known}."
            ) from error

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> torch.Tensor:
        if self._tokenizer is None:
            return super().embed_text(prompts)
        tokens = self._tokenizer(
            list(prompts),
            # Some of CLIP's relatives only know prompts that are padded to the full length.
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        return F.normalize(_pooled(self._model.get_text_features(**tokens)).float().cpu(), dim=1)

    def _features(self, images: list[Image.Image]) -> torch.Tensor:
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self._device)
        if self.reads_text:
            return _pooled(self._model.get_image_features(pixel_values=pixels))
        return self._model(pixel_values=pixels).last_hidden_state[:, 0]

    def _layers(self, images: list[Image.Image]) -> list[torch.Tensor]:
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self._device)
        model = self._model.vision_model if self.reads_text else self._model
        # The first is what goes into the first layer.
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
        depths = sorted({round((i + 1) * len(states) / FEATURE_LAYERS) - 1 for i in range(FEATURE_LAYERS)} - {-1})
        return [_as_map(states[depth], pixels.shape[-2:], model.config.patch_size) for depth in depths]


def load_image_encoder(
    name_or_path: str | Path, device: torch.device | str = "cpu", others: Sequence[str] = ()
) -> ImageEncoder:
    """An encoder by name.

    Args:
        name_or_path: ``"subject"``, ``"offline"``, a name of ``ENCODER_NAMES``, or a hub id or folder of a vision
            model of transformers.
        device: Where a pretrained one runs.
        others: What the caller takes beside folders and hub ids, for the error.

    Raises:
        UserError: if it cannot be loaded.
    """
    if name_or_path == "subject":
        return SubjectImageEncoder()
    if name_or_path == "offline":
        return OfflineImageEncoder()
    return PretrainedImageEncoder(ENCODER_NAMES.get(str(name_or_path), name_or_path), device, others)


def _pooled(features: Any) -> torch.Tensor:
    """The embedding, which some versions of transformers wrap in an output object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def _as_map(tokens: torch.Tensor, size: torch.Size, patch_size: int) -> torch.Tensor:
    """Tokens ``(N, S, C)`` as a map ``(N, C, H, W)``, without those that are no patch: class and register tokens."""
    height, width = (side // patch_size for side in size)
    # They come first in every vision transformer that has them.
    return tokens[:, -height * width :].movedim(1, 2).unflatten(2, (height, width))


def _pixels(images: Sequence[Image.Image], side: int) -> torch.Tensor:
    """RGB images as ``(N, 3, side, side)`` in [0, 1]."""
    resized = [np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(resized)).movedim(-1, 1).float() / 255
