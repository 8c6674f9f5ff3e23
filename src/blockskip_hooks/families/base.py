"""What the core needs to know about a model family; each family is one file that fills this in."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch.nn.utils.rnn import pad_sequence

from ..loading.component_config import is_absent, read_index
from ..utils.errors import UserError
from .facts import CONDITION_FLAGS, VALIDATION_FLAGS, ComfyUIFormat, Config, FamilyFacts, Flag, PromptEmbeds


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from PIL import Image


class Family(FamilyFacts):
    """Prompt encoding, latent layout, transformer call, objective and pipeline of one model family.

    Shapes use B batch, C channels, H and W height and width of latents, S tokens. "Latents" without further words are
    those that noise is added to, in the family's own layout ``(B, C, H, W)``.
    """

    # Encoding

    def outside_components(self, dtype: torch.dtype, without: Collection[str] = ()) -> dict[str, Any]:
        """Pipeline components that the model's folder lacks, loaded from where flags say.

        Args:
            dtype: Dtype of their weights.
            without: Components that are not wanted.

        Raises:
            UserError: naming the flag, if one cannot be loaded.
        """
        return {}

    def text_encoder_configs(self) -> dict[str, dict[str, Any]]:
        """Configs of the text encoders by component, with the class that the pipeline's index names."""
        index = read_index(self.model_path)
        configs = {}
        for name in self.text_components:
            file = self.model_path / name / "config.json"
            if file.is_file():
                configs[name] = {**json.loads(file.read_text()), "architectures": [index[name][1]]}
        return configs

    def text_encoder_source(self, component: str) -> tuple[str | Path, dict[str, Any]]:
        """Where a text encoder is loaded from, and further arguments of its ``from_pretrained``."""
        return self.model_path / component, {"variant": self.variant}

    def streamable_text_encoders(self, *, trains_text: bool) -> list[str]:
        """The components that may be streamed, if they are large: text encoders that do not train."""
        trained = self.trained_text_components if trains_text else ()
        return [name for name in self.text_components if name not in trained]

    def load_text_pipeline(
        self, dtype: torch.dtype, device: torch.device | str, streamed: Collection[str] = ()
    ) -> DiffusionPipeline:
        """The stock pipeline with text encoders and tokenizers only.

        Args:
            dtype: Dtype of the encoders.
            device: Where they run.
            streamed: Components whose layers are read from the checkpoint while they run.
        """
        components: dict[str, Any] = dict.fromkeys(("transformer", "vae", *self.unused_components, *streamed))
        components |= self._absences()
        components |= self.outside_components(dtype, without=streamed)
        pipeline = self.pipeline_class.from_pretrained(
            self.model_path, **components, dtype=dtype, variant=self.variant
        )
        pipeline = pipeline.to(device)
        if not streamed:
            return pipeline
        from ..loading.text_encoders import load_streamed_encoder

        configs = self.text_encoder_configs()
        for name in streamed:
            source, settings = self.text_encoder_source(name)
            encoder = load_streamed_encoder(source, configs[name], dtype=dtype, device=device, **settings)
            pipeline.register_modules(**{name: encoder})
        return pipeline

    def load_pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The complete stock pipeline, on the CPU."""
        components: dict[str, Any] = {**self._absences(), **self.outside_components(dtype)}
        return self.pipeline_class.from_pretrained(self.model_path, **components, dtype=dtype, variant=self.variant)

    def _absences(self) -> dict[str, None]:
        # A pipeline has to be told of each component that it is to do without.
        index = read_index(self.model_path)
        return dict.fromkeys(name for name in self.optional_components if is_absent(index, name))

    def missing_components(self) -> dict[str, tuple[str, str] | None]:
        """Components that the stock pipeline has to be given, because the model comes without them.

        Returns:
            By component a class of transformers and what it loads; ``None`` where the pipeline does without.
        """
        return {**self._absences()}

    @abstractmethod
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """Encode prompts with a text pipeline; the results are on the CPU."""

    def encode_pairs(
        self, pipeline: DiffusionPipeline, pairs: Sequence[tuple[str, Image.Image]]
    ) -> list[PromptEmbeds]:
        """Encode prompts with condition images, of the size of their latents; most text encoders do not see these."""
        return self.encode_prompts(pipeline, [prompt for prompt, _ in pairs])

    def shown_condition(self, image: Image.Image, pipeline_kwargs: Mapping[str, Any]) -> Image.Image:
        """The condition image of a pipeline call as the call shows it to the text encoders (:meth:`encode_pairs`)."""
        return image

    def kept_tokens(self, pipeline: DiffusionPipeline) -> int | None:
        """Tokens that the pipeline keeps of what its tokenizer returns; ``None`` where the tokenizer cuts the text."""
        return None

    def collate_embeds(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Join embeddings of several prompts; shorter ones are padded with zeros at the end of their token axis."""
        return {name: pad_sequence([e[name] for e in embeds], batch_first=True) for name in embeds[0]}

    def align_embeds(self, embeds: Mapping[str, PromptEmbeds]) -> dict[str, PromptEmbeds]:
        """Embeddings by prompt; padded to the longest, where the image's positions count the padding before it."""
        return dict(embeds)

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> ModelMixin:
        """The VAE, frozen."""
        vae = diffusers.AutoModel.from_pretrained(
            str(self.model_path), subfolder="vae", dtype=dtype, variant=self.variant
        )
        if self.flags.get("enable_vae_tiling"):
            vae.enable_tiling()
        return vae.requires_grad_(False).eval().to(device)

    def posterior(self, vae: ModelMixin, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents of pixels ``(B, 3, h, w)`` in [-1, 1]."""
        distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        std = distribution.std
        return distribution.mean, torch.zeros_like(std) if self.trains_on_mode else std

    def scale_latents(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents in the layout and range the transformer was trained on."""
        shift = self.vae_config.get("shift_factor") or 0.0
        return (latents - shift) * self.vae_config["scaling_factor"]

    # The transformer and its objective

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Latents at the noise levels of ``indices`` into the schedule: ``(1 - sigma) x + sigma noise``."""
        sigmas = self.sigmas(indices).to(latents)
        return (1.0 - sigmas) * latents + sigmas * noise

    def sigmas(self, indices: Sequence[int]) -> torch.Tensor:
        """Noise levels ``(B, 1, 1, 1)`` of indices into the schedule."""
        return self.scheduler.sigmas[list(indices)].reshape(-1, 1, 1, 1)

    def image_tokens(self, transformer_config: Config, inputs: Mapping[str, Any]) -> int:
        """Tokens of an image in the blocks' sequence, given the arguments of the transformer's forward."""
        hidden_states = inputs["hidden_states"]
        if hidden_states.ndim == 3:
            return hidden_states.shape[1]
        patch_size = transformer_config["patch_size"]
        return (hidden_states.shape[-2] // patch_size) * (hidden_states.shape[-1] // patch_size)

    def text_positions(self, transformer_config: Config, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        """Which tokens of a block's sequence are text.

        Args:
            transformer_config: Config of the transformer.
            inputs: Arguments of the transformer's forward.
            length: Tokens of the sequence; layers that see only the image have as many as it has.

        Returns:
            Booleans ``(1 or B, length)``.
        """
        image_tokens, positions = self.image_tokens(transformer_config, inputs), torch.arange(length)
        return (positions < length - image_tokens if self.text_comes_first else positions >= image_tokens)[None]

    @abstractmethod
    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer's forward.

        Args:
            transformer_config: Config of the transformer.
            noisy_latents: ``(B, C, H, W)``.
            timesteps: The scheduler's timesteps, ``(B,)``, in (0, T].
            embeds: Prompt embeddings with a batch dimension.
        """

    def with_positions(self, inputs: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
        """What :meth:`transformer_inputs` returned, with rows and columns ``(B, tokens, 2)`` for the image's tokens.

        Only for families that have ``places_patches``.
        """
        raise UserError(f"{self.name} takes no positions; give PatchSamplingConfig.positions 'patch'.")

    def with_condition(self, inputs: dict[str, Any], condition: torch.Tensor) -> dict[str, Any]:
        """What :meth:`transformer_inputs` returned, with the tokens of condition images' clean latents (B, C, H, W).

        Only for families that have ``CONDITION_FLAGS``; their :meth:`prediction_to_latents` takes the image's tokens
        from the prediction.
        """
        raise UserError(f"{self.name} takes no condition images; leave them out.")

    def prediction_to_latents(self, prediction: Any, like: torch.Tensor) -> torch.Tensor:
        """The first output of the transformer, as the velocity ``noise - x`` in the layout of the latents ``like``."""
        return prediction

    def loss_terms(
        self,
        prediction: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        noisy_latents: torch.Tensor,
        sigmas: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the loss compares: by default the predicted and the true velocity, ``(B, C, H, W)`` each."""
        return prediction, noise - latents

    # Text encoders in training

    def trainable_text_encoders(self, pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
        """The text encoders that ``--train_text_encoder`` adapts, by pipeline component.

        Raises:
            UserError: if the family has none.
        """
        if not self.trained_text_components:
            raise self._no_trained_text()
        return {name: getattr(pipeline, name) for name in self.trained_text_components}

    def prompt_tokens(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids for each trained text encoder, ``(B, S)``."""
        tokens = {}
        for name in self.trainable_text_encoders(pipeline):
            tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
            length = pipeline.tokenizer_max_length
            settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
            tokens[name] = tokenizer(list(prompts), **settings).input_ids
        return tokens

    def refresh_embeds(
        self, encoders: Mapping[str, torch.nn.Module], tokens: Mapping[str, torch.Tensor], embeds: PromptEmbeds
    ) -> PromptEmbeds:
        """``embeds`` (with a batch dimension) with the trained encoders' part computed again, with gradients."""
        raise self._no_trained_text()

    def _no_trained_text(self) -> UserError:
        return UserError(f"--train_text_encoder is not available for {self.name}; leave it out.")

    # Images and export

    def prompt_inputs(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments that give the complete pipeline a prompt as text."""
        return {"prompt": prompt, "max_sequence_length": self.flags["max_sequence_length"]}

    def image_pipeline(self, transformer: torch.nn.Module, vae: ModelMixin) -> DiffusionPipeline:
        """The stock pipeline without text encoders, around loaded modules."""
        absent = dict.fromkeys((*self.text_components, *self.unused_components))
        with no_progress_bar():
            pipeline = self.pipeline_class.from_pretrained(self.model_path, transformer=transformer, vae=vae, **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        """Keyword arguments that give the image pipeline its prompt (with a batch dimension of one)."""
        return {**embeds, **{f"negative_{name}": tensor for name, tensor in (negative or {}).items()}}


def split_batch(**embeds: torch.Tensor) -> list[PromptEmbeds]:
    """Embeddings of several prompts, prompt by prompt and on the CPU."""
    rows = zip(*(tensor.cpu() for tensor in embeds.values()), strict=True)
    return [dict(zip(embeds, row, strict=True)) for row in rows]


def repeat_given_embeds(pipeline: Any) -> None:
    """Let a pipeline repeat the embeddings that it is given for the images of a prompt.

    The stock ones repeat embeddings only where they have encoded the prompt themselves.
    """
    encode = pipeline.encode_prompt

    def encode_prompt(*args: Any, num_images_per_prompt: int = 1, **kwargs: Any) -> tuple[Any, ...]:
        embeds = encode(*args, **kwargs)
        return tuple(None if e is None else e.repeat_interleave(num_images_per_prompt, dim=0) for e in embeds)

    pipeline.encode_prompt = encode_prompt


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within this context diffusers and transformers show no bars for what they load."""
    from diffusers.utils import logging
    from transformers.utils import logging as text_logging

    libraries = [module for module in (logging, text_logging) if module.is_progress_bar_enabled()]
    for module in libraries:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in libraries:
            module.enable_progress_bar()


__all__ = [
    "CONDITION_FLAGS",
    "VALIDATION_FLAGS",
    "ComfyUIFormat",
    "Config",
    "Family",
    "Flag",
    "PromptEmbeds",
    "no_progress_bar",
    "repeat_given_embeds",
]
