"""Memory and FLOPs of the models beside the transformer: VAE and text encoders, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from ..families import Family
from ..loading.models import empty_model
from ..loading.text_encoders import empty_text_encoder, large_tables, layer_stacks
from .devices import DeviceType
from .equal_blocks import Depth, kind_of, shorten
from .fake_modules import materialise, num_bytes, streamed_weights
from .measure import Measure
from .usage import Usage


def simulate_vae(
    family: Family,
    batch_size: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    decode: bool,
    tiled: bool = False,
    device: DeviceType = "cuda",
) -> Usage:
    """What the family's VAE needs to encode, or decode, images.

    Args:
        family: The model's family.
        batch_size: Images at a time.
        size: Their height and width in pixels.
        dtype: Dtype of weights and images.
        decode: Whether latents become images; otherwise images become latents.
        tiled: Whether the VAE works tile by tile, in tiles of its class's default size.
        device: Whose rules it computes by.
    """
    vae: Any = torch.nn.Module.to(empty_model(family.vae_config), dtype)
    vae.requires_grad_(False)
    if tiled:
        vae.enable_tiling()
    with FakeTensorMode(), torch.no_grad():
        for module in vae.modules():
            materialise(module)
        measure = Measure(vae, {}, Depth({}, {}), device)
        with measure.counted() as meter:
            if decode:
                vae.decode(torch.empty((batch_size, *family.vae_latent_shape(*size)), dtype=dtype), return_dict=False)
            else:
                family.posterior(vae, torch.empty((batch_size, 3, *size), dtype=dtype))
    return measure.usage(meter)


def simulate_text_encoder(
    config: Mapping[str, Any],
    batch_size: int,
    text_tokens: int,
    dtype: torch.dtype,
    *,
    streamed: bool = False,
    device: DeviceType = "cuda",
    call: Mapping[str, bool] | None = None,
) -> Usage:
    """What a text encoder of transformers needs to encode prompts.

    Args:
        config: Its config, with ``model_type`` and ``architectures``.
        batch_size: Prompts at a time.
        text_tokens: Tokens of a prompt; an encoder that learnt its positions, such as CLIP's, gets as many as it has.
        dtype: Dtype of its weights.
        streamed: Whether its layers have weights only while they run, and large tables none on the device.
        device: Whose rules it computes by.
        call: What else it is called with, see :meth:`~blockskip_hooks.families.Family.text_call`.

    Raises:
        ValueError: if the config names no model class of transformers.
    """
    encoder = empty_text_encoder(config, dtype)
    tokens = min(text_tokens, getattr(encoder.config, "max_position_embeddings", text_tokens))
    if any(name.endswith("position_embedding") for name, _ in encoder.named_modules()):
        # Pipelines fill prompts up to its length, whatever a prompt may have.
        tokens = encoder.config.max_position_embeddings
    tables = [encoder.get_submodule(name) for name in large_tables(encoder)] if streamed else []
    stacks = layer_stacks(encoder)
    depth = shorten(
        encoder,
        [
            (f"{stack}.{number}", kind_of(layer))
            for stack in stacks
            for number, layer in encoder.get_submodule(stack).named_children()
        ],
    )
    layers = {
        f"{stack}.{number}": layer
        for stack in stacks
        for number, layer in encoder.get_submodule(stack).named_children()
    }
    for table in tables:
        table.forward = _looked_up_elsewhere(table)
    read_late = list(layers.values()) if streamed else []
    apart = {id(part) for module in (*read_late, *tables) for part in module.modules()}
    with FakeTensorMode(), torch.no_grad():
        for module in encoder.modules():
            if id(module) not in apart:
                materialise(module)
        # Layers that share their weights, such as input and output embeddings, have got a copy each.
        encoder.tie_weights()
        measure = Measure(encoder, layers, depth, device)
        with measure.counted() as meter, streamed_weights(read_late):
            encoder(input_ids=torch.zeros((batch_size, tokens), dtype=torch.long), **(call or {}))
    largest = max((sum(map(num_bytes, layer.parameters())) for layer in read_late), default=0)
    return measure.usage(meter, streamed_bytes=largest)


def _looked_up_elsewhere(table: torch.nn.Embedding) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward of a table that takes no memory for the table."""
    dim, dtype = table.embedding_dim, table.weight.dtype
    return lambda input_ids: torch.empty((*input_ids.shape, dim), dtype=dtype)
