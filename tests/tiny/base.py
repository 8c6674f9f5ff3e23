"""What the tiny models of all families share."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from blockskip_hooks.families import Family
from blockskip_hooks.loading.component_config import load_config


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny pipeline: real classes, random weights, small enough for seconds on one core.

    Attributes:
        name: Family and variant.
        family: The family.
        save: Writes the pipeline into a folder.
        num_blocks: N.
        resolution: Training resolution in pixels; half of it must be on the grid of latent tokens too.
        text_tokens: Tokens of the longest prompt, for ``--max_sequence_length``.
        flags: Further flags that a run on this pipeline needs.
        trains_text: Whether ``--train_text_encoder`` is to be tested.
    """

    name: str
    family: type[Family]
    save: Callable[[Path], None]
    num_blocks: int
    resolution: int = 64
    text_tokens: int = 12
    flags: Mapping[str, Any] = field(default_factory=dict)
    trains_text: bool = False

    @functools.cached_property
    def folder(self) -> Path:
        """The pipeline on disk, written once per process."""
        folder = Path(_scratch().name) / self.name
        self.save(folder)
        return folder

    def make_family(self, **flags: Any) -> Family:
        """The family on the pipeline's folder."""
        run = {"max_sequence_length": self.text_tokens, "resolution": self.resolution}
        return self.family(self.folder, flags={**run, **self.flags, **flags})

    def make_transformer(self) -> torch.nn.Module:
        """The pipeline's transformer, the same in every call."""
        family = self.make_family()
        transformer_class = family.transformer_class(load_config(self.folder / "transformer"))
        return transformer_class.from_pretrained(self.folder, subfolder="transformer").eval()

    def make_inputs(self, batch_size: int, text_tokens: tuple[int, ...] | None = None) -> dict[str, Any]:
        """Keyword inputs of one forward, from the family itself, the same for the same arguments.

        Args:
            batch_size: B.
            text_tokens: Tokens of each prompt; by default all have the same number.
        """
        generator = torch.Generator().manual_seed(1)
        family = self.make_family()
        config = load_config(self.folder / "transformer")
        side = 2 * family.latent_token_size
        shape = (batch_size, *family.latent_shape(side, side))
        latents = torch.randn(shape, generator=generator)
        prompts = []
        for tokens in text_tokens or (5,) * batch_size:
            prompt = family.empty_embeds(config, tokens, torch.float32)
            for name, tensor in prompt.items():
                if tensor.is_floating_point():
                    prompt[name] = torch.randn(tensor.shape, generator=generator)
            prompts.append(prompt)
        indices = [(37 * (row + 1)) % len(family.scheduler.timesteps) for row in range(batch_size)]
        return family.transformer_inputs(
            config, latents, family.scheduler.timesteps[indices], family.collate_embeds(prompts)
        )


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    # Held until the process ends, which removes it.
    return tempfile.TemporaryDirectory(prefix="tiny-pipelines-")


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter weight enough that each block changes its input: zero-initialised gates would hide bugs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.7 / fan_in**0.5) if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def forward(model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    """The prediction as one tensor, of families that give a list too."""
    prediction = model(**inputs, **kwargs, return_dict=False)[0]
    return torch.stack(prediction) if isinstance(prediction, list) else prediction


def tiny_vae(levels: int, *, scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """An autoencoder of factor ``2 ** (levels - 1)`` with four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
