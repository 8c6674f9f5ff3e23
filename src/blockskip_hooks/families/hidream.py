"""HiDream-I1: double-stream blocks, then single-stream blocks, each given a layer of Llama's; two CLIPs, T5, Llama."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch

from ..layouts import BlockLayout
from ..loading.component_config import defining_module
from ..utils.errors import UserError, first_line
from ..utils.files import expand_home
from .base import VALIDATION_FLAGS, ComfyUIFormat, Config, Family, Flag, PromptEmbeds, split_batch


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
_LLAMA_CLASS = "LlamaForCausalLM"


def _balanced_experts(moe: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The mixture of experts with equally many tokens for each expert; the router's choice is ignored."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores = torch.nn.functional.linear(tokens, moe.gate.weight).softmax(dim=-1)
    weights = scores.topk(moe.num_activated_experts, dim=-1).values
    parts = tokens.repeat_interleave(moe.num_activated_experts, dim=0).chunk(len(moe.experts))
    routed = torch.cat([expert(part) for expert, part in zip(moe.experts, parts, strict=False)])
    routed = (routed.reshape(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
    return routed.reshape(hidden_states.shape) + moe.shared_experts(hidden_states)


class HiDream(Family):
    """HiDream-I1 Full, Dev, Fast and models of their architecture.

    T5 and Llama see ``--max_sequence_length`` tokens of every prompt, padding included, as the model was trained;
    Llama's hidden states are stored with their tokens first, ``(tokens, layers, width)``.
    """

    name = "hidream"
    patch_size = None
    pipeline_name = "HiDreamImagePipeline"
    text_components = (
        *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"),
    )
    text_arguments = {"output_hidden_states": True}
    optional_components = ("text_encoder_4", "tokenizer_4")
    text_comes_first = False
    lora_layers = ("attn1.to_k", "attn1.to_q", "attn1.to_v", "attn1.to_out")
    modulation_layers = ("block.adaLN_modulation.1",)
    text_stream_layers = ("attn1.to_q_t", "attn1.to_out_t", "ff_t.w1", "ff_t.w2", "ff_t.w3")
    block_stacks = ("double_stream_blocks", "single_stream_blocks")
    # Wraps blocks of both kinds; single-stream ones are called without encoder hidden states and return none.
    block_layouts = {"HiDreamBlock": BlockLayout(return_encoder_hidden_states_index=1)}
    own_flags = (
        Flag(
            "pretrained_text_encoder_4_name_or_path",
            {
                "type": expand_home,
                "default": _LLAMA,
                "help": "Llama to encode prompts with, where the model brings none.",
            },
        ),
        Flag(
            "pretrained_tokenizer_4_name_or_path",
            {"type": expand_home, "default": _LLAMA, "help": "Llama's tokenizer, where the model brings none."},
        ),
        *VALIDATION_FLAGS,
    )
    flag_defaults = {"max_sequence_length": 128, "output_dir": "hidream-dreambooth-lora", "lora_alpha": None}
    negative_prompt = ""
    tags = ("hidream", "hidream-diffusers")
    comfyui = ComfyUIFormat("diffusion_model.")

    def load_scheduler(self) -> Any:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            self.model_path, subfolder="scheduler", shift=3.0
        )

    def empty_embeds(self, transformer_config: Config, text_tokens: int, dtype: torch.dtype) -> PromptEmbeds:
        t5_width, llama_width = transformer_config["caption_channels"]
        layers = max(transformer_config["llama_layers"]) + 1
        return {
            "prompt_embeds_t5": torch.empty((text_tokens, t5_width), dtype=dtype),
            "prompt_embeds_llama3": torch.empty((text_tokens, layers, llama_width), dtype=dtype),
            "pooled_prompt_embeds": torch.empty(transformer_config["text_emb_dim"], dtype=dtype),
        }

    def make_traceable(self, transformer: Any) -> None:
        """Let a transformer run on fake tensors: what depends on values of tensors then depends on shapes."""
        experts = defining_module("HiDreamImageTransformer2DModel").MOEFeedForwardSwiGLU
        for module in transformer.modules():
            if isinstance(module, experts):
                module.forward = functools.partial(_balanced_experts, module)
        unpatchify = transformer.unpatchify
        transformer.unpatchify = lambda tokens, sizes, is_training: unpatchify(tokens, sizes, is_training=True)

    def _hub_settings(self) -> dict[str, Any]:
        return {"cache_dir": self.flags.get("cache_dir"), "token": self.flags.get("hub_token")}

    def text_encoder_configs(self) -> dict[str, dict[str, Any]]:
        configs = super().text_encoder_configs()
        if "text_encoder_4" not in configs:
            from transformers import AutoConfig

            source, settings = self.text_encoder_source("text_encoder_4")
            # An encoder that cannot be read is reported when it is loaded.
            with contextlib.suppress(OSError, ValueError):
                config = AutoConfig.from_pretrained(source, trust_remote_code=False, **settings).to_dict()
                configs["text_encoder_4"] = {**config, "architectures": [_LLAMA_CLASS]}
        return configs

    def text_encoder_source(self, component: str) -> tuple[str | Path, dict[str, Any]]:
        if component == "text_encoder_4" and not (self.model_path / component).is_dir():
            return self.flags["pretrained_text_encoder_4_name_or_path"], self._hub_settings()
        return super().text_encoder_source(component)

    def outside_components(self, dtype: torch.dtype, without: Collection[str] = ()) -> dict[str, Any]:
        """Llama and its tokenizer where the model's folder lacks them, by pipeline component.

        Raises:
            UserError: naming the flag, if one cannot be loaded.
        """
        from transformers import AutoTokenizer, LlamaForCausalLM

        hub = self._hub_settings()
        loaders = {
            "text_encoder_4": functools.partial(LlamaForCausalLM.from_pretrained, dtype=dtype, **hub),
            "tokenizer_4": functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=False, **hub),
        }
        components = {}
        for component, load in loaders.items():
            if component in without or (self.model_path / component).is_dir():
                continue
            flag = f"pretrained_{component}_name_or_path"
            try:
                components[component] = load(self.flags[flag])
            except (OSError, ValueError) as error:
                raise UserError(
                    f"--{flag} {self.flags[flag]} cannot be loaded ({first_line(error)}); name a folder with "
                    "Llama 3.1 8B Instruct, or a hub id that you have access to."
                ) from error
        return components

    def missing_components(self) -> dict[str, tuple[str, str] | None]:
        classes = {"text_encoder_4": _LLAMA_CLASS, "tokenizer_4": "AutoTokenizer"}
        missing = {name for name in classes if not (self.model_path / name).is_dir()}
        return {name: (classes[name], self.flags[f"pretrained_{name}_name_or_path"]) for name in sorted(missing)}

    @torch.no_grad()
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[PromptEmbeds]:
        t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.flags["max_sequence_length"]
        )
        layers_last = llama.permute(1, 2, 0, 3)
        return split_batch(prompt_embeds_t5=t5, prompt_embeds_llama3=layers_last, pooled_prompt_embeds=pooled)

    def transformer_inputs(
        self, transformer_config: Config, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy_latents,
            "timesteps": timesteps,
            "encoder_hidden_states_t5": embeds["prompt_embeds_t5"],
            "encoder_hidden_states_llama3": embeds["prompt_embeds_llama3"].permute(2, 0, 1, 3),
            "pooled_embeds": embeds["pooled_prompt_embeds"],
        }

    def image_tokens(self, transformer_config: Config, inputs: Mapping[str, Any]) -> int:
        height, width = inputs["hidden_states"].shape[-2:]
        if inputs["hidden_states"].ndim == 4 and height != width:
            # Images that are not square are padded to the longest sequence.
            largest = transformer_config["max_resolution"]
            return largest[0] * largest[1] // transformer_config["patch_size"] ** 2
        return super().image_tokens(transformer_config, inputs)

    def prediction_to_latents(self, prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = like.shape
        if prediction.shape != like.shape:
            # In training mode the model returns its tokens, (B, C, tokens, p x p), padded unless the image is square.
            patch = round(prediction.shape[-1] ** 0.5)
            rows, columns = height // patch, width // patch
            tokens = prediction[:, :, : rows * columns].reshape(batch, channels, rows, columns, patch, patch)
            prediction = tokens.permute(0, 1, 2, 4, 3, 5).reshape(like.shape)
        # The model predicts x - noise.
        return -prediction

    def pipeline_inputs(self, embeds: PromptEmbeds, negative: PromptEmbeds | None) -> dict[str, Any]:
        inputs = super().pipeline_inputs(embeds, negative)
        return {k: v.permute(2, 0, 1, 3) if k.endswith("prompt_embeds_llama3") else v for k, v in inputs.items()}
