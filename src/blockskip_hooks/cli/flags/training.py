"""Flags of the LoRA, the training loop and its optimiser."""

from __future__ import annotations

import argparse

from ...utils.files import expand_home
from .types import NAMES, parse_bool


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("LoRA").add_argument
    flag("--rank", type=int, default=4, help="Rank of the LoRA matrices.")
    flag("--lora_alpha", type=int, default=4, help="LoRA scale; updates are multiplied by alpha / rank.")
    flag("--lora_dropout", type=float, default=0.0, help="Dropout in the LoRA layers.")
    flag(
        "--lora_layers",
        type=NAMES,
        help="Comma-separated ends of the names of the layers to adapt, within kept blocks; default: the family's.",
    )
    flag(
        "--lora_blocks",
        type=NAMES,
        help="Comma-separated numbers of the only blocks to adapt, counted from 0; default: all kept ones.",
    )
    flag(
        "--assistant_lora",
        type=expand_home,
        help="Frozen LoRA beside the one that trains, for distilled models: a file, a folder, owner/name or "
        "owner/name/file of the hub. It takes part in training and in the records, not in pictures, and is not "
        "exported. Default: none.",
    )
    flag("--train_text_encoder", action="store_true", help="Also train a LoRA on the CLIP text encoders.")
    flag("--fsdp_text_encoder", action="store_true", help="Not supported: sharding of the text encoder.")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("training").add_argument
    flag("--train_batch_size", type=int, default=4, help="Samples per step and process.")
    flag("--gradient_accumulation_steps", type=int, default=1, help="Batches per optimizer step.")
    flag("--num_train_epochs", type=int, default=1, help="Passes over the photos.")
    flag(
        "--max_train_steps",
        type=int,
        help="Optimizer steps in all; takes the place of --num_train_epochs. Default: the steps of those.",
    )
    flag("--seed", type=int, help="Seed of everything random; default: another in each run.")
    flag("--gradient_checkpointing", action="store_true", help="Less activation memory for one more forward.")
    flag("--cache_latents", action="store_true", help="Encode the photos once and free the VAE.")
    flag("--dataloader_num_workers", type=int, default=0, help="Processes that prepare samples; 0: the main one.")
    flag(
        "--weighting_scheme",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"),
        default="none",
        help="Distribution of timesteps and weight of the loss.",
    )
    flag("--logit_mean", type=float, default=0.0, help="Mean for --weighting_scheme logit_normal.")
    flag("--logit_std", type=float, default=1.0, help="Standard deviation for --weighting_scheme logit_normal.")
    flag("--mode_scale", type=float, default=1.29, help="Scale for --weighting_scheme mode.")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--optimizer", default="AdamW", help="AdamW or prodigy.")
    flag("--learning_rate", type=float, default=1e-4, help="Peak learning rate; about 1 with prodigy.")
    flag("--text_encoder_lr", type=float, default=5e-6, help="Learning rate of the text encoder's LoRA.")
    flag("--scale_lr", action="store_true", help="Multiply the rate by processes, batch size and accumulation.")
    flag("--lr_scheduler", default="constant", help="Shape of the learning rate over time, cosine say.")
    flag("--lr_warmup_steps", type=int, default=500, help="Steps over which the learning rate rises.")
    flag("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    flag("--lr_power", type=float, default=1.0, help="Exponent of polynomial.")
    flag("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    flag("--adam_beta1", type=float, default=0.9, help="First beta, of prodigy too.")
    flag("--adam_beta2", type=float, default=0.999, help="Second beta, of prodigy too.")
    flag("--adam_weight_decay", type=float, default=1e-4, help="Weight decay of the transformer's LoRA.")
    flag("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="Weight decay of the encoder's LoRA.")
    flag("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator, of prodigy too.")
    flag("--prodigy_beta3", type=float, help="Beta of prodigy's step size; default: the root of the second beta.")
    flag("--prodigy_decouple", type=parse_bool, default=True, help="Decoupled weight decay in prodigy: True or False.")
    flag("--prodigy_use_bias_correction", type=parse_bool, default=True, help="Bias correction: True or False.")
    flag("--prodigy_safeguard_warmup", type=parse_bool, default=True, help="Hold prodigy back in warmup: True, False.")
    flag("--max_grad_norm", type=float, default=1.0, help="Norm that gradients are clipped to.")
