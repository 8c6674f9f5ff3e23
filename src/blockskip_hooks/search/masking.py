"""Attention masking: in chosen blocks the image cannot see the text (DiT-BlockSkip, section 3.4).

What masking a block does to an image tells how much of the subject and the prompt comes in there. In joint attention
image queries lose the text keys, and text queries see everything as before; a cross-attention layer contributes
nothing. Everything else of the model is untouched, and without the hooks it is bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, ModelHook

from ..blocks import list_blocks
from ..utils.attention import Mask, masked_attention
from ..utils.errors import UserError


if TYPE_CHECKING:
    from ..families import Family


MASKING_HOOK = "blockskip_masking"


@contextmanager
def text_masked_by_row(transformer: ModelMixin, family: Family, rows: Sequence[Collection[int]]) -> Iterator[None]:
    """Within this context the images of a batch cannot see the text, each in blocks of its own.

    Args:
        transformer: The transformer, whole or wrapped by placeholders.
        family: Its family, which knows where the text is.
        rows: For each image the indices of its masked blocks, in execution order. A batch of several times as many
            images, such as that of guidance, goes through them again.

    Raises:
        ValueError: if a block does not exist; in a forward, if an attention cannot be masked.
    """
    blocks = list_blocks(transformer, family.block_stacks)
    chosen = sorted(set().union(*rows))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < len(blocks):
        raise UserError(f"Blocks {chosen} cannot be masked: the {len(blocks)} blocks are 0 to {len(blocks) - 1}.")
    inputs: dict[str, Any] = {}
    parameters = signature(type(transformer).forward)

    def remember(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs.clear()
        inputs.update(parameters.bind(module, *args, **kwargs).arguments)

    def mask_for(masked: torch.Tensor) -> Mask:
        def may_see(batch: int, length: int) -> torch.Tensor | None:
            positions = family.text_positions(transformer.config, inputs, length)
            return image_to_text_mask(positions, _repeated(masked, batch))

        return may_see

    hooked: list[torch.nn.Module] = []
    watch = transformer.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        for index in chosen:
            block, masked = blocks[index], torch.tensor([index in row for row in rows])
            if block.only is not None:
                continue  # There is no text that its image could see.
            if family.cross_attention is None:
                target, hook = block.module, JointMaskingHook(mask_for(masked), block.name)
            else:
                target, hook = block.module.get_submodule(family.cross_attention), CrossMaskingHook(masked)
            HookRegistry.check_if_exists_or_initialize(target).register_hook(hook, MASKING_HOOK)
            hooked.append(target)
        yield
    finally:
        watch.remove()
        for target in hooked:
            HookRegistry.check_if_exists_or_initialize(target).remove_hook(MASKING_HOOK, recurse=False)


def image_to_text_mask(is_text: torch.Tensor, masked: torch.Tensor | None = None) -> torch.Tensor | None:
    """What may be seen when image queries must not see text keys.

    Args:
        is_text: Which tokens of the sequence are text, ``(1 or batch, tokens)`` booleans.
        masked: Images of the batch for which it is so, ``(1 or batch,)`` booleans; by default all.

    Returns:
        Booleans ``(1 or batch, 1, tokens, tokens)``, or ``None`` if there is nothing to hide.
    """
    if not is_text.any():
        return None
    seen = is_text[:, :, None] | ~is_text[:, None, :]
    if masked is not None and not masked.all():
        seen = seen | ~masked[:, None, None]
    return seen[:, None]


def _repeated(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Values of one or some images, for a batch of a multiple of them."""
    return rows if len(rows) == 1 else rows.repeat(batch // len(rows))


class CrossMaskingHook(ModelHook):
    """Lets a cross-attention layer contribute nothing.

    Args:
        masked: To which images of the batch, ``(1 or batch,)`` booleans.
    """

    def __init__(self, masked: torch.Tensor) -> None:
        super().__init__()
        self.masked = masked

    def post_forward(self, module: torch.nn.Module, output: torch.Tensor) -> torch.Tensor:
        masked = _repeated(self.masked, output.shape[0]).to(output.device)
        return output.masked_fill(masked.reshape(-1, *(1,) * (output.ndim - 1)), 0.0)


class JointMaskingHook(ModelHook):
    """Hides text from image queries in every attention of a block.

    Args:
        may_see: The mask for a batch and a sequence length.
        name: Name of the block.
    """

    def __init__(self, may_see: Mask, name: str) -> None:
        super().__init__()
        self.may_see = may_see
        self.name = name

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with masked_attention(module, self.may_see, self.name):
            return self.fn_ref.original_forward(*args, **kwargs)
