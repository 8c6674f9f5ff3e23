"""A mask on every attention of a module, in addition to the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch.overrides import TorchFunctionMode

from .errors import UserError


Mask = Callable[[int, int], "torch.Tensor | None"]
"""From an attention's batch and sequence length to what may be seen, ``(1 or batch, 1, queries, keys)`` booleans."""


@contextmanager
def masked_attention(module: torch.nn.Module, may_see: Mask, name: str) -> Iterator[None]:
    """Within this context the attention of ``module`` sees only what it may.

    Args:
        module: A block.
        may_see: What may be seen, or ``None`` for everything.
        name: What the block is called in messages.

    Raises:
        UserError: at the end, if no attention ran that the mask could reach.
    """
    with _native_attention(module), _MaskedProducts(may_see) as products:
        yield
    if not products.reached:
        raise UserError(
            f"Text cannot be masked in {name}: its attention does not go through torch's "
            "scaled_dot_product_attention; give the transformer its default attention processors."
        )


@contextmanager
def _native_attention(module: torch.nn.Module) -> Iterator[None]:
    """Within this context diffusers runs the attention of ``module`` by torch; other backends drop or forbid masks."""
    processors: list[Any] = [getattr(part, "processor", None) for part in module.modules()]
    chosen = [(p, p._attention_backend) for p in processors if hasattr(p, "_attention_backend")]
    with attention_backend(AttentionBackendName.NATIVE):
        for processor, _ in chosen:
            processor._attention_backend = AttentionBackendName.NATIVE
        try:
            yield
        finally:
            for processor, backend in chosen:
                processor._attention_backend = backend


class _MaskedProducts(TorchFunctionMode):
    """Adds the mask to every call of torch's attention: models call it directly or through diffusers' dispatcher."""

    def __init__(self, may_see: Mask) -> None:
        super().__init__()
        self.may_see = may_see
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(func, *args, **(kwargs or {}))

    def _attention(
        self,
        func: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        ours = self.may_see(key.shape[0], key.shape[-2])
        self.reached = self.reached or ours is not None
        if ours is not None and query.shape[-2] < key.shape[-2]:
            # Models that attend in parts, or keep keys of earlier steps, ask for the last tokens.
            ours = ours[..., -query.shape[-2] :, :]
        return func(query, key, value, _both(attn_mask, ours, query), *args, **kwargs)


def _both(given: torch.Tensor | None, ours: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """The mask that a model gives, boolean or additive, and ours."""
    if ours is None:
        return given
    ours = ours.to(like.device)
    if given is None:
        return ours
    return given & ours if given.dtype == torch.bool else given.masked_fill(~ours, -torch.inf)
