"""What the core needs to know about a model family; each family is one file that fills this in."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.utils import logging
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as text_logging

from ..loading.component_config import load_config, model_class
from .text_encoders import load_streamed_encoder


PromptEmbeds = dict[str, torch.Tensor]
"""One prompt's embeddings by name, without a batch dimension; tensors whose first axis is tokens may differ in it."""


@dataclass(frozen=True)
class Flag:
    """A command-line flag that only some families have.

    Attributes:
        name: Its name, without the dashes.
        settings: Arguments of ``argparse``'s ``add_argument``: type, default, help, ...
        refusal: Why a run cannot honour the flag and what to do instead; it stops a run that is given the flag.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""

    @property
    def default(self) -> Any:
        """Value when the flag is not given."""
        return self.settings.get("default", False if self.settings.get("action") == "store_true" else None)


@dataclass(frozen=True)
class ComfyUIFormat:
    """Keys of a LoRA file that ComfyUI reads for a family and that diffusers' loader of the family reads back.

    Attributes:
        prefix: What stands before diffusers' names of the transformer's layers.
        writes_alpha: Whether each layer has its ``.alpha``; otherwise the scale is part of ``lora_B``, because the
            family's loader in diffusers refuses such keys.
    """

    prefix: str = "transformer."
    writes_alpha: bool = False


class Family(ABC):
    """Prompt encoding, latent layout, transformer call, objective and pipeline of one model family.

    Shapes use B batch, C channels, H and W height and width of latents, S tokens. "Latents" without further words are
    those that noise is added to, in the family's own layout ``(B, C, H, W)``.

    Args:
        model_path: Local folder of a pipeline.
        variant: Weight variant in the file names, such as ``"fp16"``.
        flags: Values of command-line flags by name; defaults stand in for those that are missing.

    Attributes:
        name: Name in reports.
        pipeline_class: The stock pipeline whose LoRA loader reads what we export.
        lora_layers: Modules of a block that get LoRA when ``--lora_layers`` is not given, relative to the block.
        text_stream_layers: Of these, the layers whose only effect is on the block's text output.
        modulation_layers: Linear layers of a block, relative to it, whose input depends on the timestep and the
            prompt's embedding as a whole, but on no token: their outputs are recorded with the residuals.
        text_lora_layers: Linear layers that ``--train_text_encoder`` adapts, by name suffix.
        text_components: Pipeline components that encode prompts.
        optional_components: Of these, the ones that a model may come without, null in its index: the pipeline does
            without them, or flags say where they are.
        trained_text_components: Of these, the text encoders that ``--train_text_encoder`` adapts.
        unused_components: Pipeline components that training leaves alone.
        image_components: Of these, the ones that :meth:`image_pipeline` loads beside transformer and VAE.
        block_stacks: See :func:`~blockskip_hooks.blocks.list_blocks`; ``None`` detects them.
        cross_attention: The layer of a block, relative to it, in which the image reads the text; ``None`` where both
            are in one sequence.
        patch_size: Latents per token along one side, where the pipeline packs them; ``None`` where the transformer
            does, as its config says.
        text_comes_first: Whether text is before image in that sequence.
        own_flags: Flags that have an effect with some families only, this one among them.
        flag_defaults: Defaults of flags that differ between families.
        negative_prompt: What guided pipelines are given as the negative prompt; ``None`` for those without guidance.
        tags: Tags of the model card.
        comfyui: Keys of ``--save_format comfyui``; ``None`` where ComfyUI and diffusers have none in common.
        scheduler: The training noise schedule.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_layers: ClassVar[tuple[str, ...]]
    text_stream_layers: ClassVar[tuple[str, ...]] = ()
    modulation_layers: ClassVar[tuple[str, ...]] = ()
    text_lora_layers: ClassVar[tuple[str, ...]] = ()
    text_components: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[tuple[str, ...]] = ()
    trained_text_components: ClassVar[tuple[str, ...]] = ()
    unused_components: ClassVar[tuple[str, ...]] = ()
    image_components: ClassVar[tuple[str, ...]] = ()
    block_stacks: ClassVar[tuple[str, ...] | None] = None
    cross_attention: ClassVar[str | None] = None
    patch_size: ClassVar[int | None] = 2
    text_comes_first: ClassVar[bool] = True
    own_flags: ClassVar[tuple[Flag, ...]] = ()
    flag_defaults: ClassVar[Mapping[str, Any]] = {}
    negative_prompt: ClassVar[str | None] = None
    tags: ClassVar[tuple[str, ...]] = ()
    comfyui: ClassVar[ComfyUIFormat | None] = None

    def __init__(self, model_path: Path, variant: str | None = None, flags: Mapping[str, Any] | None = None) -> None:
        self.model_path = model_path
        self.variant = variant
        defaults = {"max_sequence_length": 512, **{flag.name: flag.default for flag in self.own_flags}}
        self.flags: dict[str, Any] = {**defaults, **self.flag_defaults, **(flags or {})}
        self.scheduler = self.load_scheduler()
        self.vae_config = load_config(model_path / "vae")

    # What is known before any weight is read

    def check(self) -> None:  # noqa: B027 - most families have nothing to check
        """Find what would fail later: packages that are not installed, flags that do not fit the model.

        Raises:
            ValueError: one line that says what to do.
        """

    def transformer_class(self, transformer_config: Mapping[str, Any]) -> type[ModelMixin]:
        """The transformer's class, with LoRA methods.

        Raises:
            ValueError: if the config does not name a model class of diffusers.
        """
        return model_class(transformer_config)

    def make_traceable(self, transformer: Any) -> None:  # noqa: B027 - most transformers need nothing
        """Let an empty transformer run on fake tensors where what it does depends on the values of tensors."""

    def load_scheduler(self) -> Any:
        """The training noise schedule, with ``timesteps`` and ``sigmas`` of all training steps, noisiest first."""
        return FlowMatchEulerDiscreteScheduler.from_pretrained(self.model_path, subfolder="scheduler")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per VAE latent along one side; that of ``AutoencoderKL`` unless overridden."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def latent_token_size(self) -> int:
        """Pixels per transformer token along one side: VAE factor x patchify."""
        patch_size = self.patch_size or load_config(self.model_path / "transformer")["patch_size"]
        return patch_size * self.vae_scale_factor

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the pipeline makes unless told otherwise."""
        return load_config(self.model_path / "transformer").get("sample_size", 128) * self.vae_scale_factor

    def vae_latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latents as the VAE encodes and decodes them, from its size in pixels."""
        factor = self.vae_scale_factor
        return (self.vae_config["latent_channels"], height // factor, width // factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latents in the family's layout, from its size in pixels."""
        return self.vae_latent_shape(height, width)

    @abstractmethod
    def empty_embeds(
        self, transformer_config: Mapping[str, Any], text_tokens: int, dtype: torch.dtype
    ) -> PromptEmbeds:
        """Embeddings of a prompt of ``text_tokens`` tokens: right shapes and dtypes, every token real, no values."""

    # Encoding

    def outside_components(self, dtype: torch.dtype, without: Collection[str] = ()) -> dict[str, Any]:
        """Pipeline components that the model's folder lacks, loaded from where flags say.

        Args:
            dtype: Dtype of their weights.
            without: Components that are not wanted.

        Raises:
            ValueError: naming the flag, if one cannot be loaded.
        """
        return {}

    def text_encoder_configs(self) -> dict[str, dict[str, Any]]:
        """Configs of the text encoders by component, with the class that the pipeline's index names."""
        index = json.loads((self.model_path / "model_index.json").read_text())
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
            self.model_path, **components, torch_dtype=dtype, variant=self.variant
        )
        pipeline = pipeline.to(device)
        configs = self.text_encoder_configs() if streamed else {}
        for name in streamed:
            source, settings = self.text_encoder_source(name)
            encoder = load_streamed_encoder(source, configs[name], dtype=dtype, device=device, **settings)
            pipeline.register_modules(**{name: encoder})
        return pipeline

    def load_pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The complete stock pipeline, on the CPU."""
        components = self._absences() | self.outside_components(dtype)
        return self.pipeline_class.from_pretrained(
            self.model_path, **components, torch_dtype=dtype, variant=self.variant
        )

    @classmethod
    def absent_components(cls, index: Mapping[str, Any]) -> list[str]:
        """Which optional components a model comes without: those that its ``model_index.json`` gives no class."""
        return [name for name in cls.optional_components if (index.get(name) or [None])[0] is None]

    def _absences(self) -> dict[str, Any]:
        # A pipeline has to be told of each that it is to do without.
        return dict.fromkeys(self.absent_components(json.loads((self.model_path / "model_index.json").read_text())))

    @abstractmethod
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        """Encode prompts with a text pipeline; the results are on the CPU."""

    def collate_embeds(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Join embeddings of several prompts; shorter ones are padded with zeros at the end of their token axis."""
        return {name: pad_sequence([e[name] for e in embeds], batch_first=True) for name in embeds[0]}

    def load_vae(self, dtype: torch.dtype, device: torch.device | str) -> ModelMixin:
        """The VAE, frozen."""
        vae = AutoModel.from_pretrained(str(self.model_path), subfolder="vae", torch_dtype=dtype, variant=self.variant)
        if self.flags.get("enable_vae_tiling"):
            vae.enable_tiling()
        return vae.requires_grad_(False).eval().to(device)

    def posterior(self, vae: ModelMixin, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents of pixels ``(B, 3, h, w)`` in [-1, 1]."""
        distribution = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return distribution.mean, distribution.std

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

    def image_tokens(self, transformer_config: Mapping[str, Any], inputs: Mapping[str, Any]) -> int:
        """Tokens of an image in the blocks' sequence, given the arguments of the transformer's forward."""
        hidden_states = inputs["hidden_states"]
        if hidden_states.ndim == 3:
            return hidden_states.shape[1]
        patch_size = transformer_config["patch_size"]
        return (hidden_states.shape[-2] // patch_size) * (hidden_states.shape[-1] // patch_size)

    def text_positions(
        self, transformer_config: Mapping[str, Any], inputs: Mapping[str, Any], length: int
    ) -> torch.Tensor:
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
        self,
        transformer_config: Mapping[str, Any],
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeds: PromptEmbeds,
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer's forward.

        Args:
            transformer_config: Config of the transformer.
            noisy_latents: ``(B, C, H, W)``.
            timesteps: The scheduler's timesteps, ``(B,)``, in (0, T].
            embeds: Prompt embeddings with a batch dimension.
        """

    @abstractmethod
    def prediction_to_latents(self, prediction: Any, like: torch.Tensor) -> torch.Tensor:
        """The first output of the transformer, as the velocity ``noise - x`` in the layout of the latents ``like``."""

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
            ValueError: if the family has none.
        """
        if not self.trained_text_components:
            raise self._no_trained_text()
        return {name: getattr(pipeline, name) for name in self.trained_text_components}

    def prompt_tokens(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids for each trained text encoder, ``(B, S)``."""
        raise self._no_trained_text()

    def refresh_embeds(
        self, encoders: Mapping[str, torch.nn.Module], tokens: Mapping[str, torch.Tensor], embeds: PromptEmbeds
    ) -> PromptEmbeds:
        """``embeds`` (with a batch dimension) with the trained encoders' part computed anew, with gradients."""
        raise self._no_trained_text()

    def _no_trained_text(self) -> ValueError:
        return ValueError(f"--train_text_encoder is not available for {self.name}; leave it out.")

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

    @abstractmethod
    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        """Keyword arguments that give the image pipeline its prompt (with a batch dimension of one)."""


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within this context diffusers and transformers show no bars for what is loaded."""
    libraries = [module for module in (logging, text_logging) if module.is_progress_bar_enabled()]
    for module in libraries:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in libraries:
            module.enable_progress_bar()
