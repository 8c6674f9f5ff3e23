"""The settings of a training run: one frozen object, which the command line and its files are turned into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ..config import PatchMode, ResidualMode
from ..residuals.dtype import ResidualDtype
from ..selection import parse_skip_blocks
from ..utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Value of every flag of the training script, under the flag's name; what each one means says its help text.

    Amounts of memory and disk are numbers of bytes. ``skip_blocks`` is a text of one of the forms that
    :func:`~blockskip_hooks.selection.parse_skip_blocks` reads. Values do not change: a run that needs others makes a
    new object by :meth:`with_values`.

    Attributes:
        given: Names of the flags that the command line or a file held, whether or not their value is the default.
        family_flags: Values of the flags that only some model families have.
    """

    given: frozenset[str]
    family_flags: Mapping[str, Any]
    # settings
    config: str | None
    dump_config: bool
    # model
    pretrained_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    cache_dir: str | None
    max_sequence_length: int
    bnb_quantization_config_path: str | None
    quantization: str
    # photos
    instance_data_dir: str | None
    instance_prompt: str | None
    dataset_name: str | None
    dataset_config_name: str | None
    image_column: str
    caption_column: str | None
    repeats: int
    resolution: int
    center_crop: bool
    random_flip: bool
    image_interpolation_mode: str
    use_aspect_ratio_buckets: bool
    aspect_ratio_buckets: tuple[tuple[int, int], ...] | None
    caption_dropout: float
    # block skipping
    skip_blocks: str
    skip_ratio: float
    skip_budget: int | None
    selection_table: str | None
    strict_table: bool
    residuals: ResidualMode
    keep_modulation: bool
    residual_dtype: ResidualDtype
    residual_dir: str | None
    residual_budget: int | None
    stretch_steps: int | None
    record_repeats: int
    refresh_residuals: bool | None
    precompute_batch_size: int | None
    stream_cache: str | int
    overwrite_residuals: bool
    memory_budget: int | None
    memory_options: Sequence[str]
    plan_only: bool
    # patch sampling
    patch_sampling: PatchMode | Literal["auto"]
    min_patch_size: int | None
    max_patch_size: int | None
    # prior preservation
    with_prior_preservation: bool
    prior_loss_weight: float
    class_data_dir: str | None
    class_prompt: str | None
    num_class_images: int
    sample_batch_size: int
    prior_generation_precision: str | None
    # LoRA
    rank: int
    lora_alpha: int
    lora_dropout: float
    lora_layers: Sequence[str] | None
    lora_blocks: Sequence[str] | None
    assistant_lora: str | None
    train_text_encoder: bool
    fsdp_text_encoder: bool
    # training
    train_batch_size: int
    gradient_accumulation_steps: int
    num_train_epochs: int
    max_train_steps: int | None
    seed: int | None
    gradient_checkpointing: bool
    cache_latents: bool
    dataloader_num_workers: int
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    # optimizer
    optimizer: str
    learning_rate: float
    text_encoder_lr: float
    scale_lr: bool
    lr_scheduler: str
    lr_warmup_steps: int
    lr_num_cycles: int
    lr_power: float
    use_8bit_adam: bool
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    adam_weight_decay_text_encoder: float
    adam_epsilon: float
    prodigy_beta3: float | None
    prodigy_decouple: bool
    prodigy_use_bias_correction: bool
    prodigy_safeguard_warmup: bool
    max_grad_norm: float
    # validation
    validation_prompt: tuple[str, ...] | None
    num_validation_images: int
    validation_resolution: int | None
    validation_epochs: int
    validation_model_path: str | None
    final_validation_prompt: str | None
    skip_final_inference: bool
    # output
    output_dir: str
    checkpointing_steps: int
    checkpoints_total_limit: int | None
    resume_from_checkpoint: str | None
    upcast_before_saving: bool
    save_format: str
    export_merged: bool
    open: bool
    logging_dir: str
    report_to: Sequence[str]
    log_level: str
    push_to_hub: bool
    hub_token: str | None
    hub_model_id: str | None
    # machine
    mixed_precision: str | None
    do_fp8_training: bool
    offload: bool
    enable_vae_tiling: bool
    compile: bool
    allow_tf32: bool
    enable_npu_flash_attention: bool
    local_rank: int

    def flags(self) -> dict[str, Any]:
        """Every flag's value by name, those of some families among them."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        del own["given"], own["family_flags"]
        return {**own, **self.family_flags}

    def plain(self) -> dict[str, Any]:
        """Every flag by name, as a file or a tracker holds it: numbers, words, and lists as they are typed."""
        return {name: plain_value(name, value) for name, value in self.flags().items()}

    def with_values(self, values: Mapping[str, Any]) -> TrainSettings:
        """These settings with other values of some flags.

        Raises:
            UserError: if a name is not a flag's.
        """
        unknown = sorted(values.keys() - self.flags().keys())
        if unknown:
            raise UserError(f"Defaults for unknown flags: {', '.join(unknown)}; remove them or correct the names.")
        families = {name: values.get(name, value) for name, value in self.family_flags.items()}
        own = {name: value for name, value in values.items() if name not in families}
        return replace(self, family_flags=families, **own)

    @property
    def output_folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def class_folder(self) -> Path:
        """Folder of the class images; with prior preservation it is always given."""
        return Path(self.class_data_dir or "")

    @property
    def condition_flag(self) -> str | None:
        """The flag that says where condition images are; ``None`` for training without them."""
        named = (name for name in ("cond_image_column", "cond_data_dir") if self.family_flags.get(name) is not None)
        return next(named, None)

    @property
    def looks_up_blocks(self) -> bool:
        """Whether a selection table or the rule decides which blocks are skipped."""
        choice = parse_skip_blocks(self.skip_blocks)
        # A memory budget chooses by itself unless the flag was typed.
        chosen_by_budget = self.memory_budget is not None and "skip_blocks" not in self.given
        return choice == "auto" or isinstance(choice, int) or chosen_by_budget

    @property
    def skips(self) -> bool:
        """Whether blocks are skipped, as far as the flags alone tell."""
        return parse_skip_blocks(self.skip_blocks) not in ("none", 0, (0, 0))

    @property
    def patch_mode(self) -> PatchMode:
        """What ``--patch_sampling`` comes to, as far as the flags alone tell."""
        if self.patch_sampling != "auto":
            return self.patch_sampling
        return "dynamic" if self.skips else "none"

    @property
    def samples_per_process_step(self) -> int:
        """Samples of a kind that a process trains on in an optimiser step."""
        return self.train_batch_size * self.gradient_accumulation_steps


def plain_value(name: str, value: Any) -> Any:
    """A flag's value as it is typed: texts stay texts, and lists with separators become one."""
    if name == "aspect_ratio_buckets" and value is not None:
        return ";".join(f"{height},{width}" for height, width in value)
    if name == "validation_prompt" and value is not None:
        # One is a text, as upstream's scripts have it.
        return value[0] if len(value) == 1 else list(value)
    if name == "report_to":
        return ",".join(value) or "none"
    if isinstance(value, tuple):
        return ",".join(value)
    # A number of bytes says how it was typed.
    return value if type(value) in (bool, int, float, str, list, type(None)) else str(value)
