"""The parts of a straightforward training loop over a family's stock model, which the script's losses are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, lora_targets
from blockskip_hooks.lora import add_lora
from tests.tiny import TinyFamily


class PlainLoop:
    """The tiny model with LoRA and an optimiser, by the settings of ``tests.script``."""

    def __init__(self, tiny: TinyFamily) -> None:
        family = tiny.make_family()
        skeleton = DiTBlockSkipTransformer(tiny.make_transformer(), BlockSkipConfig(), family.block_stacks)
        targets = lora_targets(skeleton, family.lora_layers, family.text_stream_layers)
        self.vae: ModelMixin = family.load_vae(torch.float32, "cpu")
        self.transformer = tiny.make_transformer().train()
        self.parameters = add_lora(self.transformer, targets, rank=2, alpha=4, dropout=0.0, seed=3)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2, weight_decay=1e-4)

    def step(self, loss: torch.Tensor) -> float:
        """Train on a loss, and return it."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def noise_of(seeds: Sequence[int], shape: torch.Size) -> torch.Tensor:
    """Noise ``(B, *shape)`` of each seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
