# Copyright 2026 The blockskip_hooks authors. Licensed under the Apache License, Version 2.0.
"""The offline encoder of the embedded model: which subject a picture shows, and which class on which background.

It stands in for DINO and CLIP where no download is possible, and is only meant for pictures like the embedded ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class _ResidualStage(nn.Module):
    """Halves the resolution, then refines with one residual block."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.refine = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.reduce(x)))
        return F.relu(x + self.norm2(self.refine(x)))


class _Trunk(nn.Module):
    """Pictures (B, 3, H, W) to features (B, 2 * channels[-1]): mean and maximum over the last map."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(_ResidualStage(a, b) for a, b in zip((3, *channels), channels)))
        self.features = 2 * channels[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stages(images)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class SubjectEncoder(nn.Module):
    """A metric embedding of the pictured object and a classifier of object class and background.

    Args:
        classes: names of the object classes.
        backgrounds: names of the backgrounds.
        embedding_channels, classifier_channels: widths of the stages of the two networks.
        embedding_size: D of `embed`.
    """

    def __init__(
        self,
        classes: list[str],
        backgrounds: list[str],
        embedding_channels: tuple[int, ...] = (32, 64, 96, 160),
        classifier_channels: tuple[int, ...] = (24, 32, 64, 96),
        embedding_size: int = 96,
    ) -> None:
        super().__init__()
        self.classes, self.backgrounds = list(classes), list(backgrounds)
        self.embedder = _Trunk(tuple(embedding_channels))
        self.projection = nn.Linear(self.embedder.features, embedding_size)
        self.classifier = _Trunk(tuple(classifier_channels))
        self.class_head = nn.Linear(self.classifier.features, len(classes))
        self.background_head = nn.Linear(self.classifier.features, len(backgrounds))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SubjectEncoder:
        """Loads `config.json` and `model.safetensors` from a folder, in float32 and evaluation mode."""
        folder = Path(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = ("classes", "backgrounds", "embedding_channels", "classifier_channels", "embedding_size")
        encoder = cls(**{name: config[name] for name in names})
        weights = load_file(folder / "model.safetensors")
        counters = {name: value for name, value in encoder.state_dict().items() if name not in weights}
        encoder.load_state_dict({name: value.float() for name, value in weights.items()} | counters)
        return encoder.eval()

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1] to embeddings (B, D) of length 1; a dot product compares two."""
        return F.normalize(self.projection(self.embedder(images)), dim=1)

    def class_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, 64, 64) in [-1, 1] to logits of the classes (B, C) and of the backgrounds (B, K)."""
        features = self.classifier(images)
        return self.class_head(features), self.background_head(features)

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> dict[str, list[str]]:
        """Names of the class and of the background of each picture (B, 3, 64, 64) in [-1, 1]."""
        class_logits, background_logits = self.class_logits(images)
        return {
            "class": [self.classes[i] for i in class_logits.argmax(1).tolist()],
            "background": [self.backgrounds[i] for i in background_logits.argmax(1).tolist()],
        }
