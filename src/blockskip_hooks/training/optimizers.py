"""Optimisers of the upstream flags."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch


logger = logging.getLogger(__name__)


def make_optimizer(
    args: argparse.Namespace,
    transformer_parameters: list[torch.nn.Parameter],
    text_parameters: list[torch.nn.Parameter],
    learning_rate: float,
) -> torch.optim.Optimizer:
    """AdamW (32 or 8 bit) or Prodigy over the LoRA parameters, the text encoder's with settings of their own.

    Args:
        args: Validated flags.
        transformer_parameters: LoRA of the transformer.
        text_parameters: LoRA of the text encoder; empty unless ``--train_text_encoder``.
        learning_rate: Learning rate of the transformer, scaled if ``--scale_lr``.
    """
    prodigy = args.optimizer.lower() == "prodigy"
    text_rate = args.text_encoder_lr or learning_rate
    if prodigy and text_parameters and text_rate != learning_rate:
        # Prodigy estimates one step size for all groups; different rates would break the estimate.
        logger.warning("--text_encoder_lr is replaced by --learning_rate: prodigy needs one rate for all.")
        text_rate = learning_rate
    groups: list[dict[str, Any]] = [{"params": transformer_parameters, "lr": learning_rate}]
    if text_parameters:
        decay = args.adam_weight_decay_text_encoder or args.adam_weight_decay
        groups.append({"params": text_parameters, "lr": text_rate, "weight_decay": decay})
    betas = (args.adam_beta1, args.adam_beta2)
    common = {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    if prodigy:
        import prodigyopt

        return prodigyopt.Prodigy(
            groups,
            **common,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **common)
    return torch.optim.AdamW(groups, **common)
