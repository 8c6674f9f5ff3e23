"""What each flag may do to a run that goes on from a checkpoint: one entry for every flag."""

from __future__ import annotations

from typing import Any, Literal

from .run import Run
from .settings import plain_value


OnResume = Literal["kept", "compared", "changes", "free"]


def _flags(kind: OnResume, names: str) -> dict[str, OnResume]:
    return dict.fromkeys(names.split(), kind)


ON_RESUME: dict[str, OnResume] = {
    **_flags(
        "kept",
        """
        max_sequence_length repeats resolution center_crop random_flip image_interpolation_mode caption_dropout
        residuals stretch_steps record_repeats with_prior_preservation prior_loss_weight class_prompt num_class_images
        rank lora_alpha lora_dropout cache_latents weighting_scheme logit_mean logit_std mode_scale
        guidance_scale text_encoder_out_layers precondition_outputs complex_human_instruction system_prompt
        pretrained_text_encoder_4_name_or_path pretrained_tokenizer_4_name_or_path
        upsample_prompt prompt_enhancer_head_id vae_encode_mode
        """,
    ),
    **_flags(
        "compared",
        """
        pretrained_model_name_or_path revision variant cache_dir bnb_quantization_config_path quantization
        instance_data_dir instance_prompt dataset_name dataset_config_name image_column caption_column class_data_dir
        cond_image_column cond_data_dir
        skip_blocks skip_ratio skip_budget selection_table strict_table memory_budget memory_options refresh_residuals
        use_aspect_ratio_buckets aspect_ratio_buckets patch_sampling min_patch_size max_patch_size patch_positions
        lora_layers lora_blocks assistant_lora train_text_encoder optimizer use_8bit_adam num_train_epochs
        max_train_steps
        """,
    ),
    **_flags(
        "changes",
        """
        seed train_batch_size gradient_accumulation_steps learning_rate text_encoder_lr scale_lr lr_scheduler
        lr_warmup_steps lr_num_cycles lr_power adam_beta1 adam_beta2 adam_weight_decay adam_weight_decay_text_encoder
        adam_epsilon prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm
        mixed_precision residual_dtype compile
        """,
    ),
    **_flags(
        "free",
        """
        config dump_config plan_only keep_modulation residual_dir residual_budget precompute_batch_size stream_cache
        overwrite_residuals sample_batch_size prior_generation_precision fsdp_text_encoder gradient_checkpointing
        dataloader_num_workers validation_prompt num_validation_images validation_resolution validation_epochs
        final_validation_prompt validation_image skip_final_inference output_dir checkpointing_steps
        checkpoints_total_limit resume_from_checkpoint
        upcast_before_saving save_format export_merged open logging_dir report_to log_level push_to_hub hub_token
        hub_model_id do_fp8_training offload enable_vae_tiling allow_tf32 enable_npu_flash_attention local_rank
        validation_guidance_scale validation_num_inference_steps validation_model_path remote_text_encoder
        disable_training_autocast
        """,
    ),
}
"""By flag:

- ``"kept"``: it decides what the weights come to; another value is refused by name.
- ``"compared"``: so does what it comes to (weights, photos, prompts, blocks, LoRA layers), and that is compared.
- ``"changes"``: another value is honoured from the step on that the run goes on from, and the report says both.
- ``"free"``: it decides where, how fast and with what else the run works, and may change.
"""


def kept_flags(run: Run) -> dict[str, Any]:
    """Plain values of the flags that a run and its checkpoints must share, as the run resolved them."""
    plain = run.settings.plain()
    kept = {name for name, kind in ON_RESUME.items() if kind == "kept"} & plain.keys()
    if not run.settings.with_prior_preservation:
        kept -= {"prior_loss_weight", "class_prompt", "num_class_images"}
    own_config = run.quantization if run.settings.bnb_quantization_config_path else None
    return {name: plain[name] for name in sorted(kept)} | {
        "train_text_encoder": run.settings.train_text_encoder,
        "refresh_residuals": run.refreshes,
        "patch_sampling": run.patch.mode,
        "min_patch_size": run.patch.training_resolution,
        "max_patch_size": run.patch.max_size,
        "patch_positions": run.patch.positions,
        "aspect_ratio_buckets": plain_value("aspect_ratio_buckets", run.patch.buckets or None),
        "quantization": str(own_config.describe()) if own_config else run.settings.quantization,
    }


def changing_flags(run: Run) -> dict[str, Any]:
    """Plain values of the flags that may change the training of a run that goes on."""
    plain = run.settings.plain()
    return {name: plain[name] for name, kind in ON_RESUME.items() if kind == "changes"}
