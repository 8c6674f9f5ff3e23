"""Flags of the LoRA, the training loop and its optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...utils.files import expand_home
from .types import NAMES, flag, parse_bool


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """The LoRA, and the layers that it adapts."""

    title: ClassVar[str] = "LoRA"
    rank: int = flag(4, "Rank of the LoRA matrices.")
    lora_alpha: int = flag(4, "LoRA scale; updates are multiplied by alpha / rank.")
    lora_dropout: float = flag(0.0, "Dropout in the LoRA layers.")
    lora_layers: Sequence[str] | None = flag(
        None,
        "Comma-separated ends of the names of the layers to adapt, within kept blocks; default: the family's.",
        type=NAMES,
    )
    lora_blocks: Sequence[str] | None = flag(
        None,
        "Comma-separated numbers of the only blocks to adapt, counted from 0; default: all kept ones.",
        type=NAMES,
    )
    assistant_lora: str | None = flag(
        None,
        "Frozen LoRA beside the one that trains, for distilled models: a file, a folder, owner/name or "
        "owner/name/file of the hub. It takes part in training and in the records, not in pictures, and is not "
        "exported. Default: none.",
        type=expand_home,
    )
    train_text_encoder: bool = flag(False, "Also train a LoRA on the CLIP text encoders.")
    fsdp_text_encoder: bool = flag(False, "Not supported: sharding of the text encoder.")


@dataclass(frozen=True, kw_only=True)
class LoopFlags:
    """The training loop and its loss."""

    title: ClassVar[str] = "training"
    train_batch_size: int = flag(4, "Samples per step and process.")
    gradient_accumulation_steps: int = flag(1, "Batches per optimizer step.")
    num_train_epochs: int = flag(1, "Passes over the photos.")
    max_train_steps: int | None = flag(
        None, "Optimizer steps in all; takes the place of --num_train_epochs. Default: the steps of those.", type=int
    )
    seed: int | None = flag(None, "Seed of everything random; default: another in each run.", type=int)
    gradient_checkpointing: bool = flag(False, "Less activation memory for one more forward.")
    cache_latents: bool = flag(False, "Encode the photos once and free the VAE.")
    dataloader_num_workers: int = flag(0, "Processes that prepare samples; 0: the main one.")
    weighting_scheme: str = flag(
        "none",
        "Distribution of timesteps and weight of the loss.",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"),
    )
    logit_mean: float = flag(0.0, "Mean for --weighting_scheme logit_normal.")
    logit_std: float = flag(1.0, "Standard deviation for --weighting_scheme logit_normal.")
    mode_scale: float = flag(1.29, "Scale for --weighting_scheme mode.")


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """The optimiser and its learning rate."""

    title: ClassVar[str] = "optimizer"
    optimizer: str = flag("AdamW", "AdamW or prodigy.")
    learning_rate: float = flag(1e-4, "Peak learning rate; about 1 with prodigy.")
    text_encoder_lr: float = flag(5e-6, "Learning rate of the text encoder's LoRA.")
    scale_lr: bool = flag(False, "Multiply the rate by processes, batch size and accumulation.")
    lr_scheduler: str = flag("constant", "Shape of the learning rate over time, cosine say.")
    lr_warmup_steps: int = flag(500, "Steps over which the learning rate rises.")
    lr_num_cycles: int = flag(1, "Restarts of cosine_with_restarts.")
    lr_power: float = flag(1.0, "Exponent of polynomial.")
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit state, from bitsandbytes.")
    adam_beta1: float = flag(0.9, "First beta, of prodigy too.")
    adam_beta2: float = flag(0.999, "Second beta, of prodigy too.")
    adam_weight_decay: float = flag(1e-4, "Weight decay of the transformer's LoRA.")
    adam_weight_decay_text_encoder: float = flag(1e-3, "Weight decay of the encoder's LoRA.")
    adam_epsilon: float = flag(1e-8, "Added to the denominator, of prodigy too.")
    prodigy_beta3: float | None = flag(
        None, "Beta of prodigy's step size; default: the root of the second beta.", type=float
    )
    prodigy_decouple: bool = flag(True, "Decoupled weight decay in prodigy: True or False.", type=parse_bool)
    prodigy_use_bias_correction: bool = flag(True, "Bias correction: True or False.", type=parse_bool)
    prodigy_safeguard_warmup: bool = flag(True, "Hold prodigy back in warmup: True, False.", type=parse_bool)
    max_grad_norm: float = flag(1.0, "Norm that gradients are clipped to.")
