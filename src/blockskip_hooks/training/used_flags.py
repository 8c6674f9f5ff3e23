"""Which flags a run looks at: those without effect are said so at its start, and left out of its page."""

from __future__ import annotations

from collections.abc import Iterator

from ..selection import parse_skip_blocks
from .learning_rate import warms_up
from .settings import TrainSettings


_PRODIGY_FLAGS = "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup"


def without_effect(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    """Pairs of a flag that this run does not look at, and what would make it count."""
    skipping = settings.skips
    prodigy = settings.optimizer.lower() == "prodigy"
    embedded = settings.pretrained_model_name_or_path is None
    for useful, names, needs in (
        (settings.with_prior_preservation, ("class_data_dir", "class_prompt"), "--with_prior_preservation"),
        (settings.dataset_name, ("dataset_config_name", "image_column", "caption_column"), "--dataset_name"),
        (parse_skip_blocks(settings.skip_blocks) == "auto", ("skip_ratio",), "--skip_blocks auto"),
        (not settings.skip_budget, ("skip_ratio",), "a choice by ratio, which --skip_budget replaces"),
        (settings.looks_up_blocks, ("selection_table", "strict_table"), "--skip_blocks auto or a number of blocks"),
        (skipping or settings.memory_budget, ("residuals",), "skipped blocks"),
        (settings.memory_budget, ("memory_options",), "--memory_budget"),
        (skipping or settings.memory_budget, ("stream_cache",), "skipped blocks"),
        (
            skipping and settings.residuals == "precomputed",
            (
                *("residual_dir", "residual_dtype", "residual_budget"),
                *("precompute_batch_size", "overwrite_residuals", "keep_modulation"),
                *("stretch_steps", "record_repeats", "refresh_residuals"),
            ),
            "precomputed residuals of skipped blocks",
        ),
        (settings.patch_mode != "none", ("min_patch_size", "patch_positions"), "--patch_sampling other than none"),
        (settings.train_text_encoder, ("text_encoder_lr", "adam_weight_decay_text_encoder"), "--train_text_encoder"),
        (prodigy, _PRODIGY_FLAGS.split(), "--optimizer prodigy"),
        (not prodigy, ("use_8bit_adam",), "--optimizer AdamW"),
        (settings.weighting_scheme == "logit_normal", ("logit_mean", "logit_std"), "--weighting_scheme logit_normal"),
        (settings.weighting_scheme == "mode", ("mode_scale",), "--weighting_scheme mode"),
        (
            settings.validation_prompt or settings.final_validation_prompt or embedded,
            ("num_validation_images", "validation_resolution", "validation_model_path"),
            "--validation_prompt",
        ),
        (settings.validation_prompt, ("validation_epochs",), "--validation_prompt"),
        (
            settings.condition_flag and (settings.validation_prompt or settings.final_validation_prompt),
            ("validation_image",),
            "--validation_prompt and condition images",
        ),
        (
            warms_up(settings) or not settings.lr_warmup_steps,
            ("lr_warmup_steps",),
            "--lr_scheduler other than constant",
        ),
        (settings.lr_scheduler == "cosine_with_restarts", ("lr_num_cycles",), "--lr_scheduler cosine_with_restarts"),
        (settings.lr_scheduler == "polynomial", ("lr_power",), "--lr_scheduler polynomial"),
        (settings.push_to_hub, ("hub_model_id",), "--push_to_hub"),
    ):
        if not useful:
            for name in names:
                yield name, needs
