"""Residuals in half the bytes: float8 values with one scale per token."""

from __future__ import annotations

from typing import Literal

import torch


ResidualDtype = Literal["auto", "float8"]
"""``--residual_dtype``: the dtype of the hidden states, or float8."""

FLOAT8 = torch.float8_e4m3fn
PACKED = ("leading_hidden_states", "leading_encoder_hidden_states", "trailing_hidden_states")
"""Tensors of a record that float8 applies to; latents and modulation stay as they are."""
_SCALE = "_scale"


def pack_record(record: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A record with its residuals in float8, each with a further tensor ``(tokens, 1)`` of float32 scales."""
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in record.items():
        if name in PACKED:
            values = tensor.float()
            # The largest value of a token becomes the largest of the format; a token of zeros stays one.
            scale = values.abs().amax(dim=-1, keepdim=True) / torch.finfo(FLOAT8).max
            scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
            packed[name], packed[f"{name}{_SCALE}"] = (values / scale).to(FLOAT8), scale
        else:
            packed[name] = tensor
    return packed


def unpack_record(record: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Undo :func:`pack_record`, with residuals in ``dtype``; records that are not packed stay as they are."""
    return {
        name: (tensor.float() * record[f"{name}{_SCALE}"]).to(dtype) if f"{name}{_SCALE}" in record else tensor
        for name, tensor in record.items()
        if not name.endswith(_SCALE)
    }


def packed_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a residual tensor of one sample once it is packed."""
    return tensor.numel() * FLOAT8.itemsize + tensor[..., :1].numel() * torch.float32.itemsize
