"""Optimisers of the upstream flags."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .settings import TrainSettings


logger = logging.getLogger(__name__)


def make_optimizer(
    settings: TrainSettings,
    transformer_parameters: list[torch.nn.Parameter],
    text_parameters: list[torch.nn.Parameter],
    learning_rate: float,
) -> torch.optim.Optimizer:
    """AdamW (32 or 8 bit) or Prodigy over the LoRA parameters, the text encoder's with settings of their own.

    Args:
        settings: Validated flags.
        transformer_parameters: LoRA of the transformer.
        text_parameters: LoRA of the text encoder; empty unless ``--train_text_encoder``.
        learning_rate: Learning rate of the transformer, scaled if ``--scale_lr``.
    """
    prodigy = settings.optimizer.lower() == "prodigy"
    text_rate = settings.text_encoder_lr or learning_rate
    if prodigy and text_parameters and text_rate != learning_rate:
        # Prodigy estimates one step size for all groups; different rates would break the estimate.
        logger.warning("--text_encoder_lr is replaced by --learning_rate: prodigy needs one rate for all.")
        text_rate = learning_rate
    groups: list[dict[str, Any]] = [{"params": transformer_parameters, "lr": learning_rate}]
    if text_parameters:
        decay = settings.adam_weight_decay_text_encoder or settings.adam_weight_decay
        groups.append({"params": text_parameters, "lr": text_rate, "weight_decay": decay})
    betas = (settings.adam_beta1, settings.adam_beta2)
    common: dict[str, Any] = {"betas": betas, "weight_decay": settings.adam_weight_decay, "eps": settings.adam_epsilon}
    if prodigy:
        import prodigyopt

        return prodigyopt.Prodigy(
            groups,
            **common,
            beta3=settings.prodigy_beta3,
            decouple=settings.prodigy_decouple,
            use_bias_correction=settings.prodigy_use_bias_correction,
            safeguard_warmup=settings.prodigy_safeguard_warmup,
        )
    if settings.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **common)
    return torch.optim.AdamW(groups, **common)
