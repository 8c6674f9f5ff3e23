"""Memory and FLOPs of transformer forwards and training steps, without weights and without running kernels.

The real diffusers classes run on fake tensors: shapes, dtypes and lifetimes are those of a real run, no number is
computed. What is counted is the storage of live tensors, as an allocator without fragmentation would hold it, and
the FLOPs of matrix products. The fake tensors live on the CPU, where backward needs no driver; operators that other
devices fuse or keep in another dtype may differ by a few percent there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..blocks import list_blocks, split_blocks
from ..config import BlockSkipConfig
from ..families import Family
from ..hooks import CaptureDone, SpanResiduals
from ..loading.models import cast_floating, empty_model
from ..loading.quantization import QuantizationConfig, as_linear, on_channels
from ..loading.text_encoders import empty_text_encoder, large_tables, layer_stacks
from ..lora import add_lora
from ..losses import combine_losses, flow_matching_loss
from ..residuals.batches import Batch, place_embeds
from ..residuals.precompute import base_model
from ..transformer import DiTBlockSkipTransformer
from .counters import Meter


@dataclass(frozen=True)
class Usage:
    """What a piece of work needs.

    Attributes:
        peak_bytes: Most live bytes at a time, parameters included.
        parameter_bytes: Of them, parameters of the model without LoRA, a streamed block included.
        lora_bytes: Of them, LoRA weights and their optimizer state.
        product_flops: FLOPs of matrix products and convolutions.
        attention_flops: FLOPs of attention.
    """

    peak_bytes: int
    parameter_bytes: int
    lora_bytes: int = 0
    product_flops: int = 0
    attention_flops: int = 0

    @property
    def activation_bytes(self) -> int:
        """The rest: inputs, activations, and gradients alive at the peak."""
        return max(0, self.peak_bytes - self.parameter_bytes - self.lora_bytes)

    def beside(self, *, parameter_bytes: int = 0, lora_bytes: int = 0) -> Usage:
        """The same work while other parameters, or LoRA weights and optimizer state, are resident."""
        return replace(
            self,
            peak_bytes=self.peak_bytes + parameter_bytes + lora_bytes,
            parameter_bytes=self.parameter_bytes + parameter_bytes,
            lora_bytes=self.lora_bytes + lora_bytes,
        )

    def then(self, other: Usage) -> Usage:
        """This work and, after it, another: the bytes of the larger, the FLOPs of both."""
        return replace(
            max(self, other, key=lambda usage: usage.peak_bytes),
            product_flops=self.product_flops + other.product_flops,
            attention_flops=self.attention_flops + other.attention_flops,
        )


class FakeTransformer:
    """A transformer with block skipping, LoRA and no weights.

    Kept blocks have fake weights in ``dtype``, LoRA ones in float32. Skipped blocks have weights only while they run.

    Args:
        family: The model's family.
        transformer_config: Config of the transformer, with its ``_class_name``.
        config: The spans to skip.
        rank: Rank of the LoRA matrices.
        lora_targets: Full names of the modules that get LoRA.
        recorded_layers: See :class:`~blockskip_hooks.transformer.DiTBlockSkipTransformer`.
        dtype: Dtype of the model's weights. In half precision the training step runs under autocast.
        quantization: How the linear layers of kept blocks are held, if not in ``dtype``.

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
        recorded_layers: Sequence[str] = (),
        quantization: QuantizationConfig | None = None,
    ) -> None:
        self.family = family
        self.transformer_config = transformer_config
        self.dtype = dtype
        # Constants that a model keeps as ordinary tensors are not fake.
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        transformer = empty_model(transformer_config, family.transformer_class(transformer_config))
        family.make_traceable(transformer)
        cast_floating(transformer, dtype)
        transformer.requires_grad_(False)
        if quantization is not None:
            kept = split_blocks(list_blocks(transformer, family.block_stacks), config).kept
            for name in quantization.layers(transformer, [block.name for block in kept], recorded_layers):
                layer: Any = transformer.get_submodule(name)
                linear = layer if isinstance(layer, torch.nn.Linear) else as_linear(layer)
                held = _QuantizedLinear(linear, quantization)
                transformer.set_submodule(name, held if layer is linear else on_channels(held))
        if lora_targets:
            # Settings other than the rank change neither memory nor FLOPs.
            add_lora(transformer, lora_targets, rank=rank, alpha=rank, dropout=0.0, seed=0)
        self.model = DiTBlockSkipTransformer(transformer, config, family.block_stacks, recorded_layers=recorded_layers)
        self._streamed = list(self.model.streamed_modules.values())
        skipped = {id(part) for module in self._streamed for part in module.modules()}
        with self.fake_mode:
            for module in transformer.modules():
                if id(module) not in skipped:
                    _materialise(module)

    @property
    def lora_parameters(self) -> list[torch.nn.Parameter]:
        """The trainable weights."""
        return [p for p in self.model.parameters() if p.requires_grad]

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
        adapters = contextlib.nullcontext() if with_adapters else base_model(self.model.transformer)
        with adapters, self._measured(text_tokens) as meter:
            inputs = self._inputs(self._batch(batch_size, size, text_tokens))
            with self._autocast(), _streamed(self._streamed):
                residuals = self.model.capture_residuals(**inputs, return_dict=False)
        return self._usage(meter, self._largest_streamed_module()), residuals

    def block_inputs(
        self, names: Sequence[str], batch_size: int, size: tuple[int, int], text_tokens: int
    ) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Fake arguments, positional and by keyword, that a forward of the whole model gives some of its blocks.

        Args:
            names: The blocks.
            batch_size: Samples per forward.
            size: Height and width of the images in pixels.
            text_tokens: Tokens of a prompt.
        """
        seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def record(name: str) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[name] = (args, kwargs)
                if len(seen) == len(names):
                    raise CaptureDone

            return hook

        modules = [(name, self.model.transformer.get_submodule(name)) for name in names]
        handles = [module.register_forward_pre_hook(record(name), with_kwargs=True) for name, module in modules]
        try:
            with torch.no_grad(), self.fake_mode, _ReadScalars(text_tokens), self._autocast():
                inputs = self._inputs(self._batch(batch_size, size, text_tokens))
                with _streamed(self._streamed), self.model.full_model() as transformer:
                    transformer(**inputs, return_dict=False)
        except CaptureDone:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @torch.no_grad()
    def infer(self, batch_size: int, size: tuple[int, int], text_tokens: int) -> Usage:
        """A forward of the whole model without gradients, skipped blocks streamed one at a time."""
        with self._measured(text_tokens) as meter:
            inputs = self._inputs(self._batch(batch_size, size, text_tokens))
            with self._autocast(), _streamed(self._streamed), self.model.full_model() as transformer:
                transformer(**inputs, return_dict=False)
        return self._usage(meter, self._largest_streamed_module())

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
        self.model.train()
        with self._measured(text_tokens) as meter:
            if accumulated_gradients:
                for parameter in self.lora_parameters:
                    parameter.grad = torch.zeros_like(parameter)
            batch = self._batch(batch_size, size, text_tokens)
            batch.residuals = SpanResiduals(
                **{n: torch.empty((batch_size, *t.shape[1:]), dtype=t.dtype) for n, t in residuals.tensors().items()}
            )
            inputs = self._inputs(batch)
            with self._autocast():
                prediction = self.model(**inputs, residuals=batch.residuals, return_dict=False)[0]
            prediction, target = self.family.loss_terms(
                self.family.prediction_to_latents(prediction, batch.latents).float(),
                latents=batch.latents,
                noise=batch.noise,
                noisy_latents=batch.noisy_latents,
                sigmas=batch.sigmas,
            )
            losses = flow_matching_loss(prediction, target, batch.sigmas, "none")
            combine_losses(losses, with_prior_preservation=False, prior_loss_weight=0.0).backward()
        for parameter in self.lora_parameters:
            parameter.grad = None
        return self._usage(meter, 0)

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision as accelerate sets it up."""
        if self.dtype not in (torch.bfloat16, torch.float16):
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.dtype)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return self.family.transformer_inputs(
            self.transformer_config, batch.noisy_latents, batch.timesteps, batch.embeds
        )

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
        )

    @contextlib.contextmanager
    def _measured(self, text_tokens: int) -> Iterator[Meter]:
        with self.fake_mode, Meter() as meter, _ReadScalars(text_tokens):
            meter.track(self._resident())
            yield meter

    def _resident(self) -> Iterator[torch.Tensor]:
        yield from (p for p in self.model.parameters() if p.device.type != "meta")
        yield from (b for b in self.model.buffers() if b.device.type != "meta")
        # Constants in plain attributes, such as tables of rotary embeddings.
        values = [value for module in self.model.modules() for value in vars(module).values()]
        yield from (v for v in values if isinstance(v, torch.Tensor) and v.device.type != "meta")

    def _largest_streamed_module(self) -> int:
        return max((sum(map(_num_bytes, module.parameters())) for module in self._streamed), default=0)

    def _usage(self, meter: Meter, streamed_bytes: int) -> Usage:
        lora_bytes = sum(map(_num_bytes, self.lora_parameters))
        return Usage(
            peak_bytes=meter.peak,
            parameter_bytes=sum(map(_num_bytes, self._resident())) - lora_bytes + streamed_bytes,
            lora_bytes=lora_bytes,
            product_flops=meter.flops.products,
            attention_flops=meter.flops.attention,
        )


def simulate_vae(
    family: Family, batch_size: int, size: tuple[int, int], dtype: torch.dtype, *, decode: bool, tiled: bool = False
) -> Usage:
    """What the family's VAE needs to encode, or decode, images.

    Args:
        family: The model's family.
        batch_size: Images at a time.
        size: Their height and width in pixels.
        dtype: Dtype of weights and images.
        decode: Whether latents become images; otherwise images become latents.
        tiled: Whether the VAE works tile by tile, in tiles of its class's default size.
    """
    vae: Any = torch.nn.Module.to(empty_model(family.vae_config), dtype)
    vae.requires_grad_(False)
    if tiled:
        vae.enable_tiling()
    with FakeTensorMode(), torch.no_grad(), Meter() as meter:
        for module in vae.modules():
            _materialise(module)
        parameter_bytes = meter.current
        if decode:
            vae.decode(torch.empty((batch_size, *family.vae_latent_shape(*size)), dtype=dtype), return_dict=False)
        else:
            family.posterior(vae, torch.empty((batch_size, 3, *size), dtype=dtype))
    return Usage(meter.peak, parameter_bytes, 0, meter.flops.products, meter.flops.attention)


def simulate_text_encoder(
    config: Mapping[str, Any], batch_size: int, text_tokens: int, dtype: torch.dtype, *, streamed: bool = False
) -> Usage:
    """What a text encoder of transformers needs to encode prompts.

    Args:
        config: Its config, with ``model_type`` and ``architectures``.
        batch_size: Prompts at a time.
        text_tokens: Tokens of a prompt; an encoder with fewer positions gets as many as it has.
        dtype: Dtype of its weights.
        streamed: Whether its layers have weights only while they run, and large tables none on the device.

    Raises:
        ValueError: if the config names no model class of transformers.
    """
    encoder = empty_text_encoder(config, dtype)
    tokens = min(text_tokens, getattr(encoder.config, "max_position_embeddings", text_tokens))
    stacks = layer_stacks(encoder) if streamed else []
    layers = [layer for stack in stacks for layer in encoder.get_submodule(stack).children()]
    tables = [encoder.get_submodule(name) for name in large_tables(encoder)] if streamed else []
    for table in tables:
        table.forward = _looked_up_elsewhere(table)
    apart = {id(part) for layer in (*layers, *tables) for part in layer.modules()}
    with FakeTensorMode(), torch.no_grad():
        for module in encoder.modules():
            if id(module) not in apart:
                _materialise(module)
        # Layers that share their weights, such as input and output embeddings, have got a copy each.
        encoder.tie_weights()
        with Meter() as meter, _streamed(layers):
            meter.track((*encoder.parameters(), *encoder.buffers()))
            parameter_bytes = meter.current
            encoder(input_ids=torch.zeros((batch_size, tokens), dtype=torch.long))
    parameter_bytes += max((sum(map(_num_bytes, layer.parameters())) for layer in layers), default=0)
    return Usage(meter.peak, parameter_bytes, 0, meter.flops.products, meter.flops.attention)


def _looked_up_elsewhere(table: torch.nn.Embedding) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward of a table that takes no memory for the table."""
    dim, dtype = table.embedding_dim, table.weight.dtype
    return lambda input_ids: torch.empty((*input_ids.shape, dim), dtype=dtype)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _QuantizedLinear(torch.nn.Linear):
    """A layer with the bytes of a quantised weight, dequantised for each product, in forward and in backward."""

    def __init__(self, layer: torch.nn.Linear, config: QuantizationConfig) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.product_dtype = config.compute_dtype or layer.weight.dtype
        count = config.weight_bytes(layer.out_features, layer.in_features)
        self.weight = torch.nn.Parameter(torch.empty(count, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return _DequantizedProduct.apply(input, self.bias, shape, self.product_dtype).to(input.dtype)


class _DequantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.input_dtype = shape, dtype, input.dtype
        bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(input.to(dtype), torch.empty(shape, dtype=dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        product = gradient.to(ctx.dtype) @ torch.empty(ctx.shape, dtype=ctx.dtype)
        return product.to(ctx.input_dtype), None, None, None


class _ReadScalars(TorchDispatchMode):
    """Answers reads of single numbers, which fake tensors cannot give: they are lengths of prompts, all the same."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.value
        return func(*args, **(kwargs or {}))


def _materialise(module: torch.nn.Module) -> list[tuple[Any, Any, torch.Tensor]]:
    """Give a module's own tensors memory, constants in plain attributes included; returns what undoes it."""
    replaced: list[tuple[Any, Any, torch.Tensor]] = []
    holders: list[tuple[Any, Any]] = [(module._parameters, list(module._parameters))]
    holders += [(module._buffers, list(module._buffers)), (module.__dict__, list(module.__dict__))]
    holders += [(value, range(len(value))) for value in module.__dict__.values() if isinstance(value, list)]
    for holder, keys in holders:
        for key in keys:
            tensor = holder[key]
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
                continue
            value: torch.Tensor = torch.empty(tuple(tensor.shape), dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
            replaced.append((holder, key, tensor))
            holder[key] = value
    return replaced


@contextlib.contextmanager
def _streamed(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Within this context a module's weights take memory while it runs, as when they are read from the checkpoint."""
    loaded: list[tuple[Any, Any, torch.Tensor]] = []

    def load(module: torch.nn.Module, args: Any) -> None:
        for part in module.modules():
            loaded.extend(_materialise(part))

    def unload(*_: Any) -> None:
        for holder, name, tensor in loaded:
            holder[name] = tensor
        loaded.clear()

    handles = [module.register_forward_pre_hook(load) for module in modules]
    handles += [module.register_forward_hook(unload) for module in modules]
    try:
        yield
    finally:
        # A capture forward leaves its last block by an exception, which skips the forward hook.
        unload()
        for handle in handles:
            handle.remove()
