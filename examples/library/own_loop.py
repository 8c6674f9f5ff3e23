#!/usr/bin/env python
"""Block skipping in a plain torch loop of your own: no script, no accelerate. ``train_lora`` takes any transformer."""

from __future__ import annotations

import torch
from flux_samples import load_pipeline, make_samples
from peft import LoraConfig

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer, lora_targets


def train_lora(transformer, samples, config, layers=("to_q", "to_k", "to_v"), rank=8, epochs=8, lr=2e-3):
    """Train LoRA in the kept blocks on ``(inputs, target)`` pairs and return the loss of each epoch."""
    model = DiTBlockSkipTransformer(transformer, config)  # placeholders on the first and last blocks
    records = [model.capture_residuals(**inputs) for inputs, _ in samples]  # one no-grad forward each, once
    transformer.requires_grad_(False)
    targets = lora_targets(model, layers)  # in kept blocks only
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for (inputs, target), residuals in zip(samples, records, strict=True):
            prediction = model(**inputs, residuals=residuals, return_dict=False)[0]  # kept blocks only
            loss = (prediction - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() / len(samples)
        losses.append(total)
    model.remove()  # the whole model again, with the LoRA
    return losses


def main() -> None:
    """Personalise the embedded model a little, then leave it as it was."""
    pipeline = load_pipeline()
    losses = train_lora(pipeline.transformer, make_samples(pipeline), BlockSkipConfig(leading=3, trailing=5))
    print("loss of each epoch:", " ".join(f"{loss:.4f}" for loss in losses))
    pipeline.transformer.save_lora_adapter("own-loop-lora")  # transformer.load_lora_adapter(..., prefix=None) reads it
    pipeline.transformer.unload_lora()  # bit for bit the model that was loaded


if __name__ == "__main__":
    main()
