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
from collections.abc import Iterator, Mapping
from itertools import accumulate, takewhile
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses import FakeTensorMode

from ..blocks import idle_modules, list_blocks, split_blocks
from ..families.prompts import place_embeds
from ..inference.lora_files import quiet_adapters
from ..loading.models import cast_floating, empty_model
from ..loading.text_encoders import empty_text_encoder
from ..lora import ASSISTANT, TRAINED, add_lora, only_adapters, use_adapters
from ..losses import combine_losses, flow_matching_loss
from ..residuals.batches import Batch
from ..residuals.precompute import frozen_model
from ..state import SpanResiduals
from ..transformer import DiTBlockSkipTransformer
from .counters import ALL_BLOCKS, Meter
from .equal_blocks import shorten_spans
from .fake_modules import ValuesAsPlanned, materialise, num_bytes, quantize_layers, streamed_weights
from .measure import Measure, halts_before
from .request import PlanRequest
from .usage import Usage


class FakeTransformer:
    """The transformer of a planned run, with block skipping, LoRA and no weights.

    Kept blocks have fake weights in the run's dtype, LoRA ones in float32. Skipped blocks have weights only while they
    run.

    Args:
        request: What the plan depends on.

    Attributes:
        request: As given.
        num_blocks: Blocks of the full model.
        text_bytes: Parameters of the text encoders that train along, their LoRA included.

    Raises:
        ValueError: if the config names no transformer of diffusers, or no block would be kept.
    """

    def __init__(self, request: PlanRequest) -> None:
        self.request, family, dtype = request, request.family, request.weight_dtype
        # Constants that a model keeps as ordinary tensors are not fake.
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        transformer = empty_model(request.transformer_config, family.transformer_class(request.transformer_config))
        family.make_traceable(transformer)
        cast_floating(transformer, dtype)
        transformer.requires_grad_(False)
        spans = split_blocks(list_blocks(transformer, family.block_stacks), request.config)
        kept = [block.name for block in spans.kept]
        quantization, recorded = request.quantization, request.recorded_layers
        quantized = [] if quantization is None else quantization.layers(transformer, kept, recorded)
        blocks = [block.name for block in spans.leading + spans.kept + spans.trailing]
        self.num_blocks = len(blocks)
        self._recorded_width = sum(int(transformer.get_submodule(name).out_features) for name in recorded)
        treated = {"lora": request.lora_targets, "recorded": recorded, "quantized": quantized}
        assistants = {f"assistant {rank}": names for rank, names in request.assistant_layers.items()}
        self._depth, config = shorten_spans(transformer, family.block_stacks, request.config, treated | assistants)
        if quantization is not None:
            quantize_layers(transformer, self._depth.renamed(quantized, blocks), quantization)
        rank, dropout = request.rank, request.lora_dropout
        # Alpha and seed change neither memory nor FLOPs.
        lora: dict[str, Any] = {"rank": rank, "alpha": rank, "dropout": dropout, "seed": 0}
        if request.lora_targets:
            add_lora(transformer, self._depth.renamed(request.lora_targets, blocks), **lora)
        self.model = DiTBlockSkipTransformer(
            transformer, config, family.block_stacks, recorded_layers=self._depth.renamed(recorded, blocks)
        )
        # Records are as wide as those of all blocks, though fewer are simulated.
        self.model.skip_state._recorded_width = self._recorded_width
        streamed = self.model.streamed_modules
        self._streamed, self._streamed_names = list(streamed.values()), list(streamed)
        self._halting = [*self._streamed, self.model.spans.kept[0].module]
        if request.assistant_layers:
            # Once the modules that stream are known: its weights do not come with theirs.
            ranks = {n: r for r, names in request.assistant_layers.items() for n in self._depth.renamed(names, blocks)}
            _add_assistant(transformer, ranks, dtype)
        skipped = {id(part) for module in self._streamed for part in module.modules()}
        self._encoders = {name: empty_text_encoder(config, dtype) for name, config in request.trained_encoders.items()}
        for encoder in self._encoders.values():
            add_lora(encoder, family.text_lora_layers, **lora)
        models = [transformer, *self._encoders.values()]
        with self.fake_mode:
            for module in (module for model in models for module in model.modules()):
                if id(module) not in skipped:
                    materialise(module)
        self.text_bytes = sum(num_bytes(p) for encoder in self._encoders.values() for p in encoder.parameters())
        self._lora = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
        simulated = self.model.spans.leading + self.model.spans.kept + self.model.spans.trailing
        named = {block.name: block.module for block in simulated}
        self._measure = Measure(transformer, named, self._depth, request.device, beside=list(self._encoders.values()))

    def lora_sizes(self) -> list[int]:
        """Number of elements of every LoRA weight of the full model, and of text encoders that train."""
        parameters = self.model.transformer.named_parameters()
        sizes = [size for name, p in parameters if p.requires_grad for size in [p.numel()] * self._depth.times(name)]
        return sizes + [p.numel() for e in self._encoders.values() for p in e.parameters() if p.requires_grad]

    def capture(self, batch_size: int, *, with_adapters: bool = False) -> tuple[Usage, SpanResiduals]:
        """A precompute forward: no gradients, skipped blocks streamed one at a time.

        Args:
            batch_size: Samples per forward.
            with_adapters: Whether LoRA takes part, as in residuals computed online.

        Returns:
            What it needs, and fake residuals with the batch's shapes.
        """
        adapters = contextlib.nullcontext() if with_adapters else frozen_model(self.model.transformer)
        with adapters, self._counted() as meter:
            resident = meter.current
            inputs = self._arguments(self._batch(batch_size, self.request.training_size))
            with (
                self._autocast(),
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
    def infer(self, batch_size: int, size: tuple[int, int]) -> Usage:
        """A forward of the whole model on images of this height and width, skipped blocks streamed one at a time."""
        with self._counted() as meter:
            resident = meter.current
            inputs = self._arguments(self._batch(batch_size, size))
            # Of the wrapper's forward alone.
            inputs.pop("condition_tokens", None)
            with (
                self._autocast(),
                halts_before(self._halting, meter, resident) as halts,
                streamed_weights(self._streamed),
                only_adapters(self.model.transformer, [TRAINED]),
                self.model.full_model() as transformer,
            ):
                transformer(**inputs, return_dict=False)
        return self._measure.usage(meter, streamed_bytes=self.largest_streamed_bytes, halts=halts)

    def train(self, residuals: SpanResiduals) -> Usage:
        """Forward, flow-matching loss and backward of one training step.

        Args:
            residuals: With the shapes and dtypes of a sample's residuals; their batch size does not matter.

        Returns:
            What it needs, without optimizer state.
        """
        transformer: Any = self.model.transformer
        request, family = self.request, self.request.family
        # Gradients of earlier batches are there already.
        accumulates = request.gradient_accumulation_steps > 1
        if request.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            for encoder in self._encoders.values():
                encoder.gradient_checkpointing_enable()
        for module in (self.model, *self._encoders.values()):
            module.train()
        with self._counted() as meter, self._measure.backward_followed(meter):
            if accumulates:
                for parameter in self._lora:
                    parameter.grad = torch.zeros_like(parameter)
            size = request.batch_size
            batch = self._batch(size, request.training_size)
            batch.residuals = SpanResiduals(
                **{n: torch.empty((size, *t.shape[1:]), dtype=t.dtype) for n, t in residuals.tensors().items()}
            )
            if self._encoders:
                with self._autocast():
                    batch.embeds = family.refresh_embeds(self._encoders, _tokens(self._encoders, size), batch.embeds)
            inputs = self._arguments(batch)
            with self._autocast():
                prediction = self.model(**inputs, residuals=batch.residuals, return_dict=False)[0]
                # Autocast has kept its copies of the LoRA weights until now.
                meter.begin(ALL_BLOCKS)
            meter.begin(None)
            # The velocity has no name of its own: it goes before backward, as it does in training.
            prediction, target = batch.loss_terms(
                family, family.prediction_to_latents(prediction, batch.latents).float()
            )
            losses = flow_matching_loss(prediction, target, batch.sigmas, "none")
            combine_losses(losses, with_prior_preservation=False, prior_loss_weight=0.0).backward()
        for parameter in self._lora:
            parameter.grad = None
        return self._measure.usage(meter, accumulates=accumulates)

    def _batch(self, batch_size: int, size: tuple[int, int]) -> Batch:
        request, family, dtype = self.request, self.request.family, self.request.weight_dtype
        latents = torch.empty((batch_size, *family.latent_shape(*size)), dtype=dtype)
        noise, sigmas = torch.empty_like(latents), torch.empty((batch_size, 1, 1, 1), dtype=dtype)
        prompt = family.empty_embeds(request.transformer_config, request.text_tokens, dtype)
        return Batch(
            samples=[],
            latents=latents,
            noise=noise,
            noisy_latents=(1.0 - sigmas) * latents + sigmas * noise,
            timesteps=torch.empty(batch_size),
            sigmas=sigmas,
            embeds=place_embeds(family.collate_embeds([prompt] * batch_size), "cpu", dtype),
            prompts=[],
            residuals=None,
            condition=torch.empty_like(latents) if request.has_condition else None,
        )

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return batch.arguments(self.request.family, self.request.transformer_config)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Meter]:
        with self.fake_mode, self._measure.counted() as meter, ValuesAsPlanned(self.request.text_tokens):
            yield meter

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision as accelerate sets it up."""
        dtype = self.request.weight_dtype
        return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

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
