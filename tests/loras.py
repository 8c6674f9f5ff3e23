"""LoRA files with values, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME, save_lora
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from tests.tiny import TinyFamily


RANK = 4


def save_random_lora(tiny: TinyFamily, folder: Path, alpha: int, dtype: torch.dtype | None = None) -> Path:
    """The file of a LoRA of rank 4 on all blocks but the first and the last."""
    config = BlockSkipConfig(leading=1, trailing=1)
    model = DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)
    targets = lora_targets(model, tiny.family.lora_layers, tiny.family.text_stream_layers)
    parameters = add_lora(model.transformer, targets, rank=RANK, alpha=alpha, dropout=0.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_lora(folder, tiny.family, model.transformer, dtype=dtype)
    return folder / WEIGHTS_NAME


def save_large_lora(tiny: TinyFamily, folder: Path, text: bool = False) -> Path:
    """A LoRA of large random weights on the transformer, or on the first text encoder as well."""
    family, modules = tiny.make_family(), {"transformer": tiny.make_transformer()}
    if text:
        name = family.trained_text_components[0]
        modules[name] = getattr(family.load_text_pipeline(torch.float32, "cpu"), name)
    for module in modules.values():
        layers = [name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)]
        targets = [name for name in layers if name.endswith((".to_q", ".q_proj", ".to_k", ".qkv"))]
        for parameter in add_lora(module, targets, rank=2, alpha=4, dropout=0.0, seed=0):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    encoders = {name: module for name, module in modules.items() if name != "transformer"}
    save_lora(folder, type(family), modules["transformer"], encoders)
    return folder
