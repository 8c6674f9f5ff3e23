"""What a plan depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import BlockSkipConfig, PatchSamplingConfig
from ..families import Family
from ..loading.quantization import QuantizationConfig
from ..residuals.dtype import ResidualDtype
from ..selection import Selection
from .allocator import CONTEXT_BYTES
from .devices import DeviceType
from .usage import Usage


SLACK = 0.05
"""What forwards in step may take beyond the larger one of a training step and one such forward without a budget, and
what of a budget is left free."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan depends on; nothing of it needs weights.

    Attributes:
        family: The model's family.
        transformer_config: Config of the transformer, with its ``_class_name``.
        device: The device that the run is for.
        config: The spans to skip.
        patch: Patch sampling.
        batch_size: Samples per forward in training, class samples included.
        rank: Rank of the LoRA matrices.
        lora_targets: Full names of the layers that get LoRA.
        lora_dropout: As the flag.
        assistant_layers: Full names of the layers that a frozen assistant LoRA adapts, by its rank there.
        recorded_layers: Full names of the layers whose outputs are recorded with the residuals.
        quantization: How kept blocks are held; ``None`` for ``weight_dtype``.
        text_tokens: Tokens of a prompt.
        photo_prompts: Prompts of the photos.
        weight_dtype: Dtype of the frozen weights; in half precision training runs under autocast.
        gradient_checkpointing: As the flag.
        gradient_accumulation_steps: As the flag; above 1 gradients stay between batches.
        use_8bit_adam: As the flag.
        cache_latents: Whether latents are computed before training even if nothing is skipped.
        precompute_batch_size: Samples per precompute forward; by default the largest power of two that needs no
            more memory than a training step.
        num_samples: Samples that the whole run trains on, class samples included.
        samples_per_step: How many of them an optimiser step takes, over all processes; ``None`` for one process.
        stretch_steps: Steps of a stretch, at most; ``None`` for all.
        record_repeats: How many times a record is trained on.
        residual_budget_bytes: Disk that the records may take at a time; ``None`` for no limit.
        residual_dtype: How records hold residuals.
        has_condition: Whether each sample, and each validation image, has a condition image of its size.
        text_encoders: Configs of the text encoders.
        streamable_encoders: Positions of those that are streamed, if they are large and encoding would need more
            than training does; ``None`` for all.
        trained_encoders: Configs of the text encoders that train along, by component.
        resident_bytes: Parameters of other models that stay during training.
        bytes_elsewhere: Kept blocks' weights that other processes hold; ``None`` if nothing is shared.
        validation_resolution: Side of validation images in pixels; ``None`` if there are none.
        validation_batch_size: Validation images of a prompt, which may share a forward.
        validation_prompts: Their prompts.
        validation_extra_bytes: Parameters of other models that validation images need.
        validation: The same of another model that makes validation images in place of the trained one.
        class_batch_size: Class images that may share a forward; ``None`` if there are none to make.
        class_images: How many there are to make.
        class_resolution: Their side in pixels.
        memory_budget_bytes: What every stage must fit in; ``None`` for no limit.
        selection: Where the spans come from, for the plan's ``skip`` part; by default the flag.
    """

    family: Family
    transformer_config: Mapping[str, Any]
    config: BlockSkipConfig
    patch: PatchSamplingConfig
    rank: int
    lora_targets: Sequence[str]
    lora_dropout: float = 0.0
    assistant_layers: Mapping[int, Sequence[str]] = field(default_factory=dict)
    device: DeviceType = "cuda"
    recorded_layers: Sequence[str] = ()
    quantization: QuantizationConfig | None = None
    batch_size: int = 1
    text_tokens: int = 512
    photo_prompts: int = 1
    weight_dtype: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    use_8bit_adam: bool = False
    cache_latents: bool = False
    precompute_batch_size: int | None = None
    num_samples: int = 0
    samples_per_step: int | None = None
    stretch_steps: int | None = None
    record_repeats: int = 1
    residual_budget_bytes: int | None = None
    residual_dtype: ResidualDtype = "auto"
    has_condition: bool = False
    text_encoders: Sequence[Mapping[str, Any]] = ()
    streamable_encoders: Sequence[int] | None = None
    trained_encoders: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    resident_bytes: int = 0
    bytes_elsewhere: int | None = None
    validation_resolution: int | None = None
    validation_batch_size: int = 1
    validation_prompts: int = 1
    validation_extra_bytes: int = 0
    validation: PlanRequest | None = None
    class_batch_size: int | None = None
    class_images: int = 1
    class_resolution: int = 0
    memory_budget_bytes: int | None = None
    selection: Selection | None = None

    @property
    def training_size(self) -> tuple[int, int]:
        """Height and width in pixels of the largest images in training."""
        shapes = (self.patch.training_shape(bucket) for bucket in range(len(self.patch.shapes)))
        return max(shapes, key=lambda shape: shape[0] * shape[1])

    @property
    def beside_bytes(self) -> int:
        """Parameters beside the transformer's own, less those of its own that are elsewhere."""
        return self.resident_bytes - (self.bytes_elsewhere or 0)

    @property
    def step_samples(self) -> int:
        """Samples that an optimiser step takes, over all processes."""
        return self.samples_per_step or self.batch_size * self.gradient_accumulation_steps

    @property
    def stretch_samples(self) -> int:
        """Samples that a stretch has records of, at most."""
        return max(self.num_samples, 1) if self.stretch_steps is None else self.stretch_steps * self.step_samples

    def limit(self, training: Usage, alone: Usage) -> int:
        """Bytes that forwards in step may reserve, from what a training step and one such forward need."""
        if self.memory_budget_bytes is None:
            return int((1 + SLACK) * max(training.reserved_bytes, alone.reserved_bytes))
        # A budget is also for the context, and for what no plan sees.
        return int((1 - SLACK) * (self.memory_budget_bytes - (CONTEXT_BYTES if self.device == "cuda" else 0)))

    @property
    def stores_residuals(self) -> bool:
        """Whether precompute runs the transformer."""
        return self.config.num_skipped > 0 and self.config.residuals == "precomputed"
