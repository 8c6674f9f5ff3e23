"""LoRA on the kept blocks: where it goes and how it is added."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .blocks import BlockSpans, as_names, idle_modules
from .transformer import DiTBlockSkipTransformer
from .utils.errors import UserError
from .utils.seeds import derived_seed


if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel


TRAINED, ASSISTANT = "default", "assistant"
"""Names of a transformer's adapters: the LoRA that trains, and a frozen one that is there in training alone."""


def lora_targets(
    model: DiTBlockSkipTransformer,
    layers: str | Sequence[str],
    text_stream_layers: str | Sequence[str] = (),
    blocks: str | Sequence[str] | None = None,
) -> list[str]:
    """Full names of the linear layers that get LoRA: those that match ``layers``.

    Where blocks are skipped only layers inside the kept blocks do: nothing before these could learn, because their
    input is a stored tensor.

    Args:
        model: The transformer.
        layers: Name or name ending of a layer, such as ``"attn.to_q"``, or several.
        text_stream_layers: Layers that only act on the text. Nothing reads the text after the last block that trains,
            be it the model's last or one before a trailing span, so there they would never learn and are left out.
        blocks: Qualified names of the only blocks that are to train, such as ``"transformer_blocks.3"``; ``None`` for
            no limit.

    Raises:
        ValueError: if ``model`` is not wrapped, a name of ``layers`` matches nothing at all, or no match is left: in
            the kept blocks, in ``blocks``, or outside the text's last layers.
    """
    if not isinstance(model, DiTBlockSkipTransformer):
        raise UserError(
            f"lora_targets needs to know which blocks are kept, and a {type(model).__name__} does not say; give the "
            "DiTBlockSkipTransformer around it."
        )
    layers, text_stream_layers = as_names(layers), as_names(text_stream_layers)
    if not layers:
        raise UserError("lora_targets was given no layer; name some, such as 'attn.to_q'.")
    kept = tuple(f"{block.name}." for block in model.spans.kept)
    unread = tuple(f"{name}." for name in (*idle_modules(model.transformer), *_unread_blocks(model.spans)))
    last_kept = f"{model.spans.kept[-1].name}."
    names = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    targets: list[str] = []
    for layer in layers:
        matches = [name for name in names if name == layer or name.endswith(f".{layer}")]
        if not matches:
            raise UserError(f"lora_targets.layers '{layer}' is the name of no linear layer of this model; correct it.")
        targets += [
            name
            for name in matches
            if (not model.spans.skipped or name.startswith(kept)) and not f"{name}.".startswith(unread)
        ]
    if not targets:
        raise UserError(
            f"lora_targets.layers '{','.join(layers)}' matches no layer of a kept block; name layers that the "
            f"kept blocks ({model.spans.kept[0].name} to {model.spans.kept[-1].name}) have, or skip fewer blocks."
        )
    if blocks is not None:
        blocks = as_names(blocks)
        targets = [name for name in targets if name.startswith(tuple(f"{block}." for block in blocks))]
        if not targets:
            raise UserError(
                f"lora_targets.blocks: none of {', '.join(blocks)} has a layer of lora_targets.layers; name others."
            )
    targets = [name for name in targets if not (name.startswith(last_kept) and _ends_with(name, text_stream_layers))]
    if not targets:
        raise UserError(
            f"lora_targets.layers '{','.join(layers)}' names text layers of {model.spans.kept[-1].name} only, whose "
            "output nothing reads; name further layers or skip fewer trailing blocks."
        )
    return list(dict.fromkeys(targets))


def _unread_blocks(spans: BlockSpans) -> list[str]:
    """Names of the kept blocks that see the text alone and come after every block that would read it from them."""
    readers = [block.index for block in spans.kept if block.only is None]
    return [block.name for block in spans.kept if block.only == "text" and block.index > max(readers, default=-1)]


def _ends_with(name: str, layers: Sequence[str]) -> bool:
    return any(name.endswith(f".{layer}") for layer in layers)


def add_lora(
    module: ModelMixin | PreTrainedModel, targets: Sequence[str], *, rank: int, alpha: int, dropout: float, seed: int
) -> list[torch.nn.Parameter]:
    """Freeze ``module``, add LoRA in float32 and return its parameters. Weights start the same for the same seed."""
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(derived_seed(seed, "lora"))
        # peft could not merge LoRA into weights of torchao; nothing here merges.
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass", category=UserWarning)
        module.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                init_lora_weights="gaussian",
                target_modules=list(targets),
            )
        )
    cast_training_params(module, dtype=torch.float32)
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            # Half precision trains under autocast, which casts the weights; a float32 copy of each layer's input
            # would only be kept for backward.
            layer.cast_input_dtype_enabled = False
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def use_adapters(transformer: ModelMixin, names: Sequence[str]) -> None:
    """Let these of a transformer's adapters take part and no others; of them :data:`TRAINED` alone has gradients."""
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(names))
            layer.set_requires_grad(ASSISTANT, False)


@contextmanager
def only_adapters(transformer: ModelMixin, names: Sequence[str] = ()) -> Iterator[None]:
    """Within this context these adapters take part and no others; by default the transformer is the base model."""
    layers = (module for module in transformer.modules() if isinstance(module, BaseTunerLayer))
    active: Sequence[str] = next((layer.active_adapters for layer in layers), [])
    use_adapters(transformer, names)
    try:
        yield
    finally:
        use_adapters(transformer, active)
