"""Memory and FLOPs of transformer forwards and training steps, without weights and without running kernels.

The real diffusers classes run on fake tensors: shapes, dtypes and lifetimes are those of a real run, no number is
computed. What is counted is the storage of live tensors, as an allocator without fragmentation would hold it, and
the FLOPs of matrix products. Dtypes and what is kept for backward follow the device that is planned for, see
:mod:`~blockskip_hooks.planning.devices`. Of equal blocks only a few are simulated, see
:mod:`~blockskip_hooks.planning.equal_blocks`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses import FakeTensorMode

from ..blocks import idle_modules, list_blocks, split_blocks
from ..config import BlockSkipConfig
from ..families import Family
from ..families.prompts import place_embeds
from ..inference.lora_files import quiet_adapters
from ..loading.models import cast_floating, empty_model
from ..loading.quantization import QuantizationConfig
from ..loading.text_encoders import empty_text_encoder
from ..lora import ASSISTANT, TRAINED, add_lora, only_adapters, use_adapters
from ..losses import combine_losses, flow_matching_loss
from ..residuals.batches import Batch
from ..residuals.precompute import frozen_model
from ..state import SpanResiduals
from ..transformer import DiTBlockSkipTransformer
from .counters import ALL_BLOCKS, Meter
from .devices import DeviceType
from .equal_blocks import shorten_spans
from .fake_modules import ValuesAsPlanned, materialise, num_bytes, quantize_layers, streamed_weights
from .measure import Measure, halts_before
from .usage import Usage


class FakeTransformer:
    """A transformer with block skipping, LoRA and no weights.

    Kept blocks have fake weights in ``dtype``, LoRA ones in float32. Skipped blocks have weights only while they run.

    Args:
        family: The model's family.
        transformer_config: Config of the transformer, with its ``_class_name``.
        config: The spans to skip.
        rank: Rank of the LoRA matrices.
        lora_targets: Full names of the modules that get LoRA.
        lora_dropout: Dropout in them, whose masks are kept for backward.
        assistant_layers: Full names of the layers that a frozen LoRA adapts in training, by its rank there.
        recorded_layers: See :class:`~blockskip_hooks.transformer.DiTBlockSkipTransformer`.
        dtype: Dtype of the model's weights. In half precision the training step runs under autocast.
        quantization: How the linear layers of kept blocks are held, if not in ``dtype``.
        device: Whose rules it computes by.
        trained_encoders: Configs of the text encoders that train along, by component.
        has_condition: Whether a condition image of the size of the image is in the sequence.

    Attributes:
        num_blocks: Blocks of the full model.
        text_bytes: Parameters of the text encoders that train along, their LoRA included.

    Raises:
        ValueError: if the config names no transformer of diffusers, or no block would be kept.
    """

    def __init__(
        self,
        family: Family,
        transformer_config: Mapping[str, Any],
        config: BlockSkipConfig,
        *,
        rank: int,
        lora_targets: Sequence[str],
        dtype: torch.dtype,
        lora_dropout: float = 0.0,
        assistant_layers: Mapping[int, Sequence[str]] | None = None,
        recorded_layers: Sequence[str] = (),
        quantization: QuantizationConfig | None = None,
        device: DeviceType = "cuda",
        trained_encoders: Mapping[str, Mapping[str, Any]] | None = None,
        has_condition: bool = False,
    ) -> None:
        self.family = family
        self.has_condition = has_condition
        self.transformer_config = transformer_config
        self.dtype = dtype
        self.device = device
        # Constants that a model keeps as ordinary tensors are not fake.
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        transformer = empty_model(transformer_config, family.transformer_class(transformer_config))
        family.make_traceable(transformer)
        cast_floating(transformer, dtype)
        transformer.requires_grad_(False)
        spans = split_blocks(list_blocks(transformer, family.block_stacks), config)
        kept = [block.name for block in spans.kept]
        quantized = [] if quantization is None else quantization.layers(transformer, kept, recorded_layers)
        blocks = [block.name for block in spans.leading + spans.kept + spans.trailing]
        self.num_blocks = len(blocks)
        self._recorded_width = sum(int(transformer.get_submodule(name).out_features) for name in recorded_layers)
        treated = {"lora": lora_targets, "recorded": recorded_layers, "quantized": quantized}
        assistants = {f"assistant {rank}": names for rank, names in (assistant_layers or {}).items()}
        self._depth, config = shorten_spans(transformer, family.block_stacks, config, treated | assistants)
        if quantization is not None:
            quantize_layers(transformer, self._depth.renamed(quantized, blocks), quantization)
        if lora_targets:
            # Alpha and seed change neither memory nor FLOPs.
            targets = self._depth.renamed(lora_targets, blocks)
            add_lora(transformer, targets, rank=rank, alpha=rank, dropout=lora_dropout, seed=0)
        self.model = DiTBlockSkipTransformer(
            transformer,
            config,
            family.block_stacks,
            recorded_layers=self._depth.renamed(recorded_layers, blocks),
        )
        streamed = self.model.streamed_modules
        self._streamed, self._streamed_names = list(streamed.values()), list(streamed)
        self._halting = [*self._streamed, self.model.spans.kept[0].module]
        if assistant_layers:
            # Once the modules that stream are known: its weights do not come with theirs.
            ranks = {n: r for r, names in assistant_layers.items() for n in self._depth.renamed(names, blocks)}
            _add_assistant(transformer, ranks, dtype)
        skipped = {id(part) for module in self._streamed for part in module.modules()}
        self._encoders = {name: empty_text_encoder(config, dtype) for name, config in (trained_encoders or {}).items()}
        for encoder in self._encoders.values():
            add_lora(encoder, family.text_lora_layers, rank=rank, alpha=rank, dropout=lora_dropout, seed=0)
        models = [transformer, *self._encoders.values()]
        with self.fake_mode:
            for module in (module for model in models for module in model.modules()):
                if id(module) not in skipped:
                    materialise(module)
        self.text_bytes = sum(num_bytes(p) for encoder in self._encoders.values() for p in encoder.parameters())
        self._lora = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
        simulated = self.model.spans.leading + self.model.spans.kept + self.model.spans.trailing
        named = {block.name: block.module for block in simulated}
        self._measure = Measure(transformer, named, self._depth, device, beside=list(self._encoders.values()))

    def lora_sizes(self) -> list[int]:
        """Number of elements of every LoRA weight of the full model, and of text encoders that train."""
        parameters = self.model.transformer.named_parameters()
        sizes = [size for name, p in parameters if p.requires_grad for size in [p.numel()] * self._depth.times(name)]
        return sizes + [p.numel() for e in self._encoders.values() for p in e.parameters() if p.requires_grad]

    def capture(
        self, batch_size: int, size: tuple[int, int], text_tokens: int, *, with_adapters: bool = False
    ) -> tuple[Usage, SpanResiduals]:
        """A precompute forward: no gradients, skipped blocks streamed one at a time.

        Args:
            batch_size: Samples per forward.
            size: Height and width of the images in pixels.
            text_tokens: Tokens of a prompt.
            with_adapters: Whether LoRA takes part, as in residuals computed online.

        Returns:
            What it needs, and fake residuals with the batch's shapes.
        """
        adapters = contextlib.nullcontext() if with_adapters else frozen_model(self.model.transformer)
        with adapters, self._counted(text_tokens) as meter:
            resident = meter.current
            inputs = self._batch(batch_size, size, text_tokens).arguments(self.family, self.transformer_config)
            with (
                _autocast(self.dtype),
                halts_before(self._halting, meter, resident) as halts,
                streamed_weights(self._streamed),
            ):
                residuals = self.model.capture_residuals(**inputs, return_dict=False)
            modulation = residuals.modulation
            if modulation is not None:
                # While the recorded outputs are joined, they are there twice; those of all blocks.
                meter.begin(None)
                meter.raise_peak(self._recorded_width * modulation.shape[0] * modulation.element_size())
        if modulation is not None:
            with self.fake_mode:
                residuals.modulation = torch.empty((batch_size, self._recorded_width), dtype=modulation.dtype)
        return self._measure.usage(meter, streamed_bytes=self.largest_streamed_bytes, halts=halts), residuals

    @torch.no_grad()
    def infer(self, batch_size: int, size: tuple[int, int], text_tokens: int) -> Usage:
        """A forward of the whole model without gradients, skipped blocks streamed one at a time."""
        with self._counted(text_tokens) as meter:
            resident = meter.current
            inputs = self._batch(batch_size, size, text_tokens).arguments(self.family, self.transformer_config)
            # Of the wrapper's forward alone.
            inputs.pop("condition_tokens", None)
            with (
                _autocast(self.dtype),
                halts_before(self._halting, meter, resident) as halts,
                streamed_weights(self._streamed),
                only_adapters(self.model.transformer, [TRAINED]),
                self.model.full_model() as transformer,
            ):
                transformer(**inputs, return_dict=False)
        return self._measure.usage(meter, streamed_bytes=self.largest_streamed_bytes, halts=halts)

    def train(
        self,
        batch_size: int,
        size: tuple[int, int],
        text_tokens: int,
        residuals: SpanResiduals,
        *,
        gradient_checkpointing: bool = False,
        accumulated_gradients: bool = False,
    ) -> Usage:
        """Forward, flow-matching loss and backward of one training step.

        Args:
            batch_size: Samples per forward.
            size: Height and width of the images in pixels.
            text_tokens: Tokens of a prompt.
            residuals: With the shapes and dtypes of a sample's residuals; their batch size does not matter.
            gradient_checkpointing: Whether blocks are computed again in backward.
            accumulated_gradients: Whether gradients of earlier batches are there already.

        Returns:
            What it needs, without optimizer state.
        """
        transformer: Any = self.model.transformer
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            for encoder in self._encoders.values():
                encoder.gradient_checkpointing_enable()
        for module in (self.model, *self._encoders.values()):
            module.train()
        with self._counted(text_tokens) as meter, self._measure.backward_followed(meter):
            if accumulated_gradients:
                for parameter in self._lora:
                    parameter.grad = torch.zeros_like(parameter)
            batch = self._batch(batch_size, size, text_tokens)
            batch.residuals = SpanResiduals(
                **{n: torch.empty((batch_size, *t.shape[1:]), dtype=t.dtype) for n, t in residuals.tensors().items()}
            )
            if self._encoders:
                with _autocast(self.dtype):
                    batch.embeds = self.family.refresh_embeds(
                        self._encoders, _tokens(self._encoders, batch_size), batch.embeds
                    )
            inputs = batch.arguments(self.family, self.transformer_config)
            with _autocast(self.dtype):
                prediction = self.model(**inputs, residuals=batch.residuals, return_dict=False)[0]
                # Autocast has kept its copies of the LoRA weights until now.
                meter.begin(ALL_BLOCKS)
            meter.begin(None)
            prediction, target = batch.loss_terms(
                self.family, self.family.prediction_to_latents(prediction, batch.latents).float()
            )
            losses = flow_matching_loss(prediction, target, batch.sigmas, "none")
            combine_losses(losses, with_prior_preservation=False, prior_loss_weight=0.0).backward()
        for parameter in self._lora:
            parameter.grad = None
        return self._measure.usage(meter, accumulates=accumulated_gradients)

    def _batch(self, batch_size: int, size: tuple[int, int], text_tokens: int) -> Batch:
        latents = torch.empty((batch_size, *self.family.latent_shape(*size)), dtype=self.dtype)
        noise, sigmas = torch.empty_like(latents), torch.empty((batch_size, 1, 1, 1), dtype=self.dtype)
        prompt = self.family.empty_embeds(self.transformer_config, text_tokens, self.dtype)
        return Batch(
            samples=[],
            latents=latents,
            noise=noise,
            noisy_latents=(1.0 - sigmas) * latents + sigmas * noise,
            timesteps=torch.empty(batch_size),
            sigmas=sigmas,
            embeds=place_embeds(self.family.collate_embeds([prompt] * batch_size), "cpu", self.dtype),
            prompts=[],
            residuals=None,
            condition=torch.empty_like(latents) if self.has_condition else None,
        )

    @contextlib.contextmanager
    def _counted(self, text_tokens: int) -> Iterator[Meter]:
        with self.fake_mode, self._measure.counted() as meter, ValuesAsPlanned(text_tokens):
            yield meter

    @property
    def largest_streamed_bytes(self) -> int:
        """Weights of the largest block that is streamed."""
        return max(self._streamed_bytes(), default=0)

    @property
    def ahead_bytes(self) -> int:
        """Weights that blocks and what is read while they run take beyond the largest block, at most.

        While a block runs those behind it are read, in the order in which they run, up to the size of the largest.
        """
        sizes, largest = self._streamed_bytes(), self.largest_streamed_bytes
        most = largest
        for place, size in enumerate(sizes):
            read = accumulate(sizes[place + 1 :] + sizes[:place])
            most = max(most, size + max(takewhile(lambda ahead: ahead <= largest, read), default=0))
        return most - largest

    def _streamed_bytes(self) -> list[int]:
        """Weights of each block of the full model that is streamed and runs; what only references need never does."""
        idle = idle_modules(self.model.transformer)
        return [
            size
            for name, module in zip(self._streamed_names, self._streamed, strict=True)
            if name not in idle
            for size in [sum(map(num_bytes, module.parameters()))] * self._depth.times(name)
        ]


def _autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision as accelerate sets it up."""
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype)


def _tokens(encoders: Mapping[str, Any], batch_size: int) -> dict[str, torch.Tensor]:
    """Tokens of a batch's prompts for each text encoder that trains, padded to its length."""
    return {
        name: torch.zeros((batch_size, encoder.config.max_position_embeddings), dtype=torch.long)
        for name, encoder in encoders.items()
    }


def _add_assistant(transformer: torch.nn.Module, ranks: Mapping[str, int], dtype: torch.dtype) -> None:
    """Put a frozen LoRA beside the one that trains, given its rank in each layer by name."""
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(r=1, lora_alpha=1, rank_pattern=patterns, target_modules=list(ranks))
    with quiet_adapters():
        inject_adapter_in_model(config, transformer, ASSISTANT, low_cpu_mem_usage=True)
    use_adapters(transformer, [TRAINED, ASSISTANT])
    for name in ranks:
        layer: Any = transformer.get_submodule(name)
        layer.cast_input_dtype_enabled = False
        for part in (layer.lora_A, layer.lora_B):
            part[ASSISTANT].to(dtype)
