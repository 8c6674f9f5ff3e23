"""A run before any weight is read: its settings, and what follows from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..blocks import block_bytes, list_blocks, modulation_layers
from ..config import BlockSkipConfig, PatchSamplingConfig
from ..data.photo import Photo
from ..data.sample_plan import SampleKind
from ..families import Family
from ..loading.component_config import load_config
from ..loading.quantization import QuantizationConfig, read_quantization
from ..search.tables import SelectionTable
from ..selection import Selection
from ..transformer import DiTBlockSkipTransformer
from ..utils.files import existing_parent
from ..utils.machine import cache_bytes
from ..utils.pictures import within
from .assistant import Assistant
from .chosen_blocks import choose_blocks
from .settings import TrainSettings


DEFAULT_RESIDUAL_BUDGET = 16 * 10**9
REFRESHES = 10
"""Stretches of a run whose residuals follow the LoRA, unless ``--stretch_steps`` says otherwise."""


@dataclass(frozen=True)
class Run:
    """Settings of one run, resolved.

    Attributes:
        settings: The flags, after family and model defaults.
        family: The model's family, on the model's folder.
        model_name: What the user called the model, for reports.
        embedded: Whether the embedded model is used.
        skeleton: The transformer without weights, placeholders on.
        selection: The skipped blocks.
        config: The same as a config.
        patch: Patch sampling.
        targets: Full names of the layers that get LoRA.
        photos: The instance photos, not decoded yet.
        prompts: Validation prompts.
        validation_image: Condition image of validation images.
        assistant: The frozen LoRA beside the one that trains.
        validation_family: Family and folder of another model that makes validation images in place of the trained
            one.
        validation_kwargs: Arguments of the pipeline call that makes validation images.
        pipeline_kwargs: Arguments of the pipeline call that the model asks for.
        quantization: How kept blocks are held; ``None`` for plain weights.
        table: What is known of the harm of skipping this model's blocks.
        shares_weights: Whether processes divide the frozen weights of kept blocks.
    """

    settings: TrainSettings
    family: Family
    model_name: str
    embedded: bool
    skeleton: DiTBlockSkipTransformer
    selection: Selection
    config: BlockSkipConfig
    patch: PatchSamplingConfig
    targets: list[str]
    photos: list[Photo]
    prompts: list[str]
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    table: SelectionTable | None = None
    shares_weights: bool = False
    validation_image: Image.Image | None = None
    assistant: Assistant | None = None
    validation_family: Family | None = None
    validation_kwargs: dict[str, Any] = field(default_factory=dict)

    def skipping(self, selection: Selection, flags: Mapping[str, Any]) -> Run:
        """This run with other blocks skipped and other values of some flags."""
        # A pair of numbers is taken as it is; what it was taken from is said by the selection.
        pair = f"{selection.leading},{selection.trailing}" if selection.num_skipped else "none"
        settings = self.settings.with_values({**flags, "skip_blocks": pair})
        blocks = choose_blocks(settings, self.family, self.model_name, self.table) | {"selection": selection}
        quantization = read_quantization(settings.quantization, settings.bnb_quantization_config_path)
        return replace(self, settings=settings, quantization=quantization, **blocks)

    def with_flag(self, name: str, value: Any) -> Run:
        """This run with another value of a flag that its blocks do not depend on."""
        return replace(self, settings=self.settings.with_values({name: value}))

    @property
    def seed(self) -> int:
        """The seed, which :func:`~blockskip_hooks.training.record_plan.resolve_seed` must have chosen by then."""
        assert self.settings.seed is not None
        return self.settings.seed

    @property
    def output_dir(self) -> Path:
        return self.settings.output_folder

    @property
    def residual_dir(self) -> Path:
        return Path(self.settings.residual_dir) if self.settings.residual_dir else self.output_dir / "residuals"

    @property
    def skips(self) -> bool:
        return self.config.num_skipped > 0

    @property
    def recorded_layers(self) -> tuple[str, ...]:
        """Names of the modulation layers whose outputs are recorded, so that training does without their weights."""
        settings = self.settings
        # A trained text encoder would change their input.
        if not self.stores_residuals or settings.keep_modulation or settings.train_text_encoder:
            return ()
        names = modulation_layers(self.skeleton.spans, self.family.modulation_layers)
        return tuple(name for name in names if name not in set(self.targets))

    @property
    def shares_text(self) -> bool:
        """Whether samples of a prompt share a record of the text after the leading span."""
        return self.stores_residuals and not self.settings.train_text_encoder and self.skeleton.spans.shares_text

    @property
    def stores_residuals(self) -> bool:
        """Whether training reads residuals from records."""
        return self.skips and self.config.residuals == "precomputed"

    @property
    def uses_store(self) -> bool:
        """Whether training reads records: precomputed residuals, or latents cached ahead of training."""
        return self.stores_residuals or self.settings.cache_latents

    @property
    def refreshes(self) -> bool:
        """Whether each stretch's residuals are computed with the LoRA learnt so far."""
        wanted = self.settings.refresh_residuals
        if wanted is None:
            # No LoRA changes what comes out of a leading span.
            wanted = self.config.trailing > 0 and not self.settings.residual_dir
        return self.stores_residuals and wanted

    @property
    def record_repeats(self) -> int:
        """How many times a record is trained on."""
        return self.settings.record_repeats if self.stores_residuals else 1

    def block_bytes(self, dtype: torch.dtype) -> list[int]:
        """Bytes of each block's parameters in ``dtype``, in execution order."""
        return block_bytes(list_blocks(self.skeleton.transformer, self.family.block_stacks), dtype)

    @property
    def kinds(self) -> tuple[SampleKind, ...]:
        return ("instance", "class") if self.settings.with_prior_preservation else ("instance",)

    @property
    def makes_images(self) -> bool:
        """Whether validation images are made at some time."""
        during = self.prompts if self.settings.validation_prompt else []
        return bool(self.settings.num_validation_images and (during or self.final_prompts))

    @property
    def final_prompts(self) -> list[str]:
        """Prompts of the images after training."""
        if self.settings.skip_final_inference:
            return []
        return [self.settings.final_validation_prompt] if self.settings.final_validation_prompt else self.prompts

    @property
    def batches(self) -> bool:
        """Whether samples share forwards in training, so that their prompts' embeddings are put together."""
        return self.settings.train_batch_size * len(self.kinds) > 1

    @property
    def aligns_prompts(self) -> bool:
        """Whether the embeddings of all prompts that are trained with have one length."""
        return self.family.aligns_prompts and self.batches

    @property
    def encodes_pairs(self) -> bool:
        """Whether text encoders see each photo's condition image beside its prompt."""
        return self.family.reads_condition and self.settings.condition_flag is not None

    @property
    def image_family(self) -> Family:
        """The model that makes validation images."""
        return self.validation_family or self.family

    @property
    def image_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline call that makes validation images."""
        side, family = self.settings.validation_resolution, self.image_family
        kwargs = self.validation_kwargs | ({} if side is None else family.image_arguments(side))
        if self.validation_image is None:
            return kwargs
        return kwargs | {"image": within(self.validation_image, kwargs.get("height", family.image_size) ** 2)}

    @property
    def image_size(self) -> int:
        """Height in pixels of validation images."""
        return self.image_kwargs.get("height", self.image_family.image_size)

    @property
    def class_image_size(self) -> int:
        """Height in pixels of class images."""
        return self.pipeline_kwargs.get("height", self.family.image_size)

    @property
    def negative_prompt(self) -> str | None:
        """Negative prompt of class images, for pipelines that are guided."""
        return self.pipeline_kwargs.get("negative_prompt", self.family.negative_prompt)

    @property
    def image_negative_prompt(self) -> str | None:
        """Negative prompt of validation images, for pipelines that are guided."""
        return self.validation_kwargs.get("negative_prompt", self.image_family.negative_prompt)

    @property
    def transformer_config(self) -> dict[str, Any]:
        """Config of the transformer, with its class name."""
        return load_config(self.family.model_path / "transformer")

    def samples_per_step(self, num_processes: int) -> int:
        """Samples of a kind in an optimiser step, over all processes."""
        return self.settings.samples_per_process_step * num_processes

    def residual_budget(self) -> int:
        """Bytes that the residual store may take."""
        if self.settings.residual_budget is not None:
            return int(self.settings.residual_budget)
        return min(DEFAULT_RESIDUAL_BUDGET, shutil.disk_usage(existing_parent(self.residual_dir)).free // 2)

    def longest_stretch(self, num_steps: int) -> int:
        """Steps of a stretch as far as flags decide, whatever there is room for."""
        refreshed = -(-num_steps // REFRESHES) if self.refreshes else num_steps
        return min(self.settings.stretch_steps or refreshed, num_steps)

    @property
    def may_overwrite(self) -> bool:
        """Whether records of another run may be dropped: always in the run's own folder, else when told to."""
        return self.settings.overwrite_residuals or not self.settings.residual_dir

    def model_options(
        self,
        dtype: torch.dtype,
        device: torch.device,
        shard: Callable[..., None] | None = None,
        family: Family | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of ``DiTBlockSkipTransformer.from_pretrained`` beside the folder and the spans.

        Args:
            dtype: Dtype of frozen weights.
            device: Where the kept blocks go.
            shard: What divides their weights among processes, for runs that share them.
            family: Family and folder of the model; by default the trained one's.
        """
        family = family or self.family
        return {
            "torch_dtype": dtype,
            "device": device,
            "variant": self.settings.variant,
            "stacks": family.block_stacks,
            "transformer_class": family.transformer_class(load_config(family.model_path / "transformer")),
            "recorded_layers": self.recorded_layers,
            "quantization": self.quantization,
            "shard": shard if self.shares_weights else None,
            "stream_cache": cache_bytes(self.settings.stream_cache, device),
        }
