"""What is known of a model family before any weight is read."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import torch

from ..layouts import BlockLayout
from ..loading.component_config import diffusers_class, load_config, model_class
from ..utils.files import expand_home


if TYPE_CHECKING:
    from diffusers import ModelMixin


Config = Mapping[str, Any]
"""A component's config file."""

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


CONDITION_FLAGS = (
    Flag("cond_image_column", {"help": "Column of --dataset_name with the condition images; default: no pairs."}),
    Flag(
        "cond_data_dir",
        {
            "type": expand_home,
            "help": "Folder of the condition images of --instance_data_dir: x_cond.png or, in another folder, x.png; "
            "default: no pairs.",
        },
    ),
    Flag(
        "validation_image",
        {"type": expand_home, "help": "Condition image of the validation pictures; with pairs, no default."},
    ),
)
"""Flags of families whose pipelines take condition images; see :meth:`~.base.Family.with_condition`."""


VALIDATION_FLAGS = (
    Flag(
        "validation_guidance_scale",
        {
            "type": float,
            "default": None,
            "help": "Guidance of validation pictures, 0 for none; default: that of the model that makes them.",
        },
    ),
    Flag(
        "validation_num_inference_steps",
        {
            "type": int,
            "default": None,
            "help": "Denoising steps of validation pictures; default: those of the model that makes them.",
        },
    ),
)
"""Flags of families that have distilled models."""


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


class _PipelineClass:
    """``pipeline_class`` of a family: looked up where it is used, because importing a pipeline takes seconds."""

    def __get__(self, family: object, owner: type[FamilyFacts]) -> Any:
        return owner.find_pipeline_class()


class FamilyFacts(ABC):
    """What is known of a family, and of a model of it, before any weight is read.

    Args:
        model_path: Local folder of a pipeline.
        variant: Weight variant in the file names, such as ``"fp16"``.
        flags: Values of command-line flags by name; defaults stand in for those that are missing.

    Attributes:
        name: Name in reports.
        pipeline_name: Name of the stock pipeline's class in diffusers.
        pipeline_class: The stock pipeline, whose LoRA loader reads what we export; imported when it is first used.
        lora_layers: Modules of a block that get LoRA when ``--lora_layers`` is not given, relative to the block.
        text_stream_layers: Of these, the layers whose only effect is on the block's text output.
        modulation_layers: Linear layers of a block, relative to it, whose input depends on the timestep and the
            prompt's embedding as a whole, but on no token: their outputs are recorded with the residuals.
        text_lora_layers: Linear layers that ``--train_text_encoder`` adapts, by name suffix.
        text_components: Pipeline components that encode prompts.
        text_arguments: What the pipeline calls its text encoders with beside tokens, T5 apart, where it bears on their
            memory: whether they keep the hidden states of all layers, and no cache of keys and values.
        optional_components: Components that a model may come without, null in its index or not in it: the pipeline
            does without them or makes them, or flags say where they are.
        trained_text_components: Of these, the text encoders that ``--train_text_encoder`` adapts.
        text_width: Entry of the transformer's config that says how wide a token's embedding is.
        text_masks: Dtypes of the masks beside ``prompt_embeds``, by name.
        template_tokens: Tokens that the pipeline puts before a prompt and cuts off once the text encoder has run.
        unused_components: Pipeline components that training leaves alone.
        image_components: Of these, the ones that :meth:`image_pipeline` loads beside transformer and VAE.
        block_stacks: See :func:`~blockskip_hooks.blocks.list_blocks`; ``None`` detects them.
        block_layouts: Layouts of block classes, by class name, that diffusers does not know or describes wrongly; by
            the name of a stack where stacks of one class differ.
        idle_modules: Modules of the transformer, and lists of them, that no image without a reference needs.
        cross_attention: The layer of a block, relative to it, in which the image reads the text; ``None`` where both
            are in one sequence.
        patch_size: Latents per token along one side, where the pipeline packs them; ``None`` where the transformer
            does, as its config says.
        text_comes_first: Whether text is before image in that sequence.
        aligns_prompts: Whether prompts that share batches must have one length; see
            :meth:`~.base.Family.align_embeds`.
        places_patches: Whether patches may have the positions of the photo; see :meth:`~.base.Family.with_positions`.
        reads_condition: Whether the text encoders see the condition image, too: a prompt's embeddings are then those
            of a pair, whose crop is the same in the whole run; see :meth:`~.base.Family.encode_pairs`.
        condition_on_mode: Whether a condition image's latents are the mode of the posterior where others are drawn.
        own_flags: Flags that have an effect with some families only, this one among them.
        flag_defaults: Defaults of flags that differ between families.
        trains_on_mode: Whether latents are the mode of the VAE's posterior, as upstream, and not drawn from it.
        negative_prompt: What guided pipelines are given as the negative prompt; ``None`` for those without guidance.
        tags: Tags of the model card.
        comfyui: Keys of ``--save_format comfyui``; ``None`` where ComfyUI and diffusers have none in common.
        scheduler: The training noise schedule.
    """

    name: ClassVar[str]
    pipeline_name: ClassVar[str]
    pipeline_class = _PipelineClass()
    lora_layers: ClassVar[tuple[str, ...]]
    text_stream_layers: ClassVar[tuple[str, ...]] = ()
    modulation_layers: ClassVar[tuple[str, ...]] = ()
    text_lora_layers: ClassVar[tuple[str, ...]] = ()
    text_components: ClassVar[tuple[str, ...]] = ()
    text_arguments: ClassVar[Mapping[str, bool]] = {}
    optional_components: ClassVar[tuple[str, ...]] = ()
    trained_text_components: ClassVar[tuple[str, ...]] = ()
    text_width: ClassVar[str] = "joint_attention_dim"
    text_masks: ClassVar[Mapping[str, torch.dtype]] = {}
    template_tokens: ClassVar[int] = 0
    unused_components: ClassVar[tuple[str, ...]] = ()
    image_components: ClassVar[tuple[str, ...]] = ()
    block_stacks: ClassVar[tuple[str, ...] | None] = None
    block_layouts: ClassVar[Mapping[str, BlockLayout]] = {}
    idle_modules: ClassVar[tuple[str, ...]] = ()
    cross_attention: ClassVar[str | None] = None
    patch_size: ClassVar[int | None] = 2
    text_comes_first: ClassVar[bool] = True
    aligns_prompts: ClassVar[bool] = False
    places_patches: ClassVar[bool] = False
    reads_condition: ClassVar[bool] = False
    condition_on_mode: ClassVar[bool] = False
    own_flags: ClassVar[tuple[Flag, ...]] = ()
    flag_defaults: ClassVar[Mapping[str, Any]] = {}
    trains_on_mode: bool = False
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

    @classmethod
    def text_call(cls, config: Config) -> dict[str, bool]:
        """Of :attr:`text_arguments` those that the text encoder of this config is called with."""
        return {} if config["model_type"] == "t5" else dict(cls.text_arguments)

    @classmethod
    def find_pipeline_class(cls) -> Any:
        """Import the pipeline's class.

        Raises:
            UserError: if the installed diffusers does not have it.
        """
        return diffusers_class(cls.pipeline_name)

    def check(self) -> None:  # noqa: B027 - most families have nothing to check
        """Check packages that the family needs and flags that must fit the model.

        Raises:
            UserError: one line that says what to do.
        """

    def transformer_class(self, transformer_config: Config) -> type[ModelMixin]:
        """The transformer's class, with LoRA methods.

        Raises:
            UserError: if the config does not name a model class of diffusers.
        """
        return model_class(transformer_config)

    def make_traceable(self, transformer: Any) -> None:  # noqa: B027 - most transformers need nothing
        """Let an empty transformer run on fake tensors, where its computation depends on the values of tensors."""

    def load_scheduler(self) -> Any:
        """The training noise schedule, with ``timesteps`` and ``sigmas`` of all training steps, noisiest first."""
        return diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(self.model_path, subfolder="scheduler")

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

    @property
    def known_image_size(self) -> int | None:
        """Side in pixels of the images that this model is made for; ``None`` if its configs do not say.

        VAEs of published models say 1024, for pipelines that make images of the family's size; a lower number is that
        of a smaller model.
        """
        latents = load_config(self.model_path / "transformer").get("sample_size")
        pixels = self.vae_config.get("sample_size")
        if isinstance(latents, int):
            return latents * self.vae_scale_factor
        if not isinstance(pixels, int):
            return None
        return self.image_size if pixels >= 1024 else pixels

    def image_arguments(self, side: int) -> dict[str, Any]:
        """Arguments of the pipeline call that make it draw square images of this side in pixels, and no others."""
        arguments: dict[str, Any] = {"height": side, "width": side}
        # Such pipelines draw at the nearest size that they were trained on, and scale the image.
        if "use_resolution_binning" in inspect.signature(self.pipeline_class.__call__).parameters:
            arguments["use_resolution_binning"] = False
        return arguments

    def few_step_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline call with which a distilled model of this family makes images.

        Empty for models that are not distilled, and where the pipeline's own values are right.
        """
        return {}

    def vae_latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latents as the VAE encodes and decodes them, from its size in pixels."""
        factor = self.vae_scale_factor
        return (self.vae_config["latent_channels"], height // factor, width // factor)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latents in the family's layout, from its size in pixels."""
        return self.vae_latent_shape(height, width)

    def empty_embeds(self, transformer_config: Config, text_tokens: int, dtype: torch.dtype) -> PromptEmbeds:
        """Embeddings of a prompt of ``text_tokens`` tokens: right shapes and dtypes, every token real, no values."""
        width = transformer_config[self.text_width]
        masks = {name: torch.ones(text_tokens, dtype=kind) for name, kind in self.text_masks.items()}
        return {"prompt_embeds": torch.empty((text_tokens, width), dtype=dtype), **masks}
