"""FLUX.3's pipeline, which diffusers has as a modular one, loaded and called as its other pipelines are."""

from __future__ import annotations

import inspect
from copy import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux3AutoBlocks, Flux3ModularPipeline
from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from transformers import AutoTokenizer

from ..utils.errors import UserError


class TextProcessor:
    """A tokenizer in the place of the model's processor, which needs further packages for the images it can read.

    Args:
        tokenizer: The processor's tokenizer, with the chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template


class Flux3ImagePipeline(Flux3ModularPipeline):
    """The stock modular pipeline with ``from_pretrained`` and the call of diffusers' other pipelines.

    Every step is a block of the stock pipeline. Its prompt upsampler, a language model of its own, is left out:
    prompts are encoded as they are given.
    """

    guider: Any
    _patchify_latents = staticmethod(Flux3VaeEncoderStep._patchify_latents)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None, **components: Any
    ) -> Flux3ImagePipeline:
        """Load the pipeline of a model, on the CPU.

        Args:
            folder: The model's folder, or its id on the hub.
            dtype: Dtype of what is loaded; float32 by default.
            variant: Weight variant in the file names.
            **components: Components that are there already, or ``None`` for those that are not wanted or come later.
                Without text encoder and tokenizer the pipeline takes embeddings in place of prompts.

        Raises:
            UserError: if a component cannot be loaded.
        """
        blocks = Flux3AutoBlocks()
        blocks.sub_blocks.pop("prompt_upsampler")
        if all(components.get(name, name) is None for name in ("text_encoder", "tokenizer")):
            blocks.sub_blocks.pop("text_encoder")
        pipeline = cls(blocks=blocks, pretrained_model_name_or_path=str(folder))
        for name in sorted(set(pipeline.pretrained_component_names) - components.keys()):
            components[name] = pipeline._load(name, folder, dtype or torch.float32, variant)
        pipeline.register_components(
            **{name: part for name, part in components.items() if part is not None and name in pipeline.components}
        )
        return pipeline

    def _load(self, name: str, folder: str | Path, dtype: torch.dtype, variant: str | None) -> Any:
        if name == "tokenizer":
            return TextProcessor(AutoTokenizer.from_pretrained(str(folder), subfolder=name, trust_remote_code=False))
        spec = self.get_component_spec(name)
        is_model = issubclass(spec.type_hint, torch.nn.Module)
        weights: dict[str, Any] = {"dtype": dtype, "variant": variant} if is_model else {}
        if spec.type_hint.__module__.startswith("transformers."):
            weights["trust_remote_code"] = False
        try:
            return spec.load(pretrained_model_name_or_path=str(folder), subfolder=name, **weights)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} of {folder} cannot be loaded ({error}); download it again.") from error

    def register_modules(self, **components: Any) -> None:
        """Give the pipeline components, as other pipelines' method of this name does."""
        self.register_components(**components)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of the bar over denoising steps, wherever among the blocks the loop is."""
        waiting = list(self._blocks.sub_blocks.values())
        while waiting:
            block = waiting.pop()
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**settings)
            waiting += getattr(block, "sub_blocks", {}).values()

    def encode_prompt(self, prompt: str, max_sequence_length: int) -> torch.Tensor:
        """The embeddings of one prompt by the stock text step, ``(1, S, D)``."""
        encoder = copy(self)
        encoder._blocks = self._blocks.sub_blocks["text_encoder"]
        # A guided pipeline would encode the empty prompt as well.
        encoder.guider = None
        step: Any = super(Flux3ImagePipeline, encoder).__call__
        return step(prompt=prompt, max_sequence_length=max_sequence_length, output="prompt_embeds")

    def __call__(  # type: ignore[override]
        self,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Make images; arguments that are not given have the stock blocks' defaults."""
        arguments = {name: value for name, value in locals().items() if name in _ARGUMENTS and value is not None}
        # One of its own for each call: calls of copies that take turns count their own steps.
        self.guider = copy(self.guider)
        self.guider.guidance_scale = guidance_scale
        return ImagePipelineOutput(images=super().__call__(**arguments, output="images"))


_ARGUMENTS = inspect.signature(Flux3ImagePipeline.__call__).parameters.keys() - {"self", "guidance_scale"}
