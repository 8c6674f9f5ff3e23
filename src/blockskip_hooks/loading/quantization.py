"""Quantised kept blocks: bitsandbytes or torchao hold their linear layers in 4 or 8 bits, made so while loading.

A convolution with a kernel of one pixel is a linear layer on the channels and is held as one; half of a SANA block's
weights are such. Skipped blocks, recorded layers and what lies outside the blocks keep the checkpoint's dtype: they
are streamed, or small. No arithmetic of quantisation is done here, the two libraries do it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..utils.errors import UserError, first_line


METHODS = ("nf4", "int8", "none")
# Weights that share one scale: bitsandbytes' blocks, and those of its nested quantisation of the scales.
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the linear layers of kept blocks are held.

    Attributes:
        library: Which library does it.
        bits: Bits of a weight, 4 or 8.
        quant_type: Number format of 4-bit weights, ``"nf4"`` or ``"fp4"``.
        compute_dtype: Dtype that 4-bit weights are multiplied in; ``None`` for the dtype they had.
        double_quant: Whether the scales of 4-bit weights are quantised too.
        storage: Dtype that 4-bit weights are packed in.
        threshold: Activations above it are not rounded to 8 bits by bitsandbytes' 8-bit layers.
        skipped_layers: Layers that stay as they are, by their name or by a part of its path.
    """

    library: Literal["bitsandbytes", "torchao"]
    bits: Literal[4, 8]
    quant_type: str = "nf4"
    compute_dtype: torch.dtype | None = None
    double_quant: bool = False
    storage: torch.dtype = torch.uint8
    threshold: float = 6.0
    skipped_layers: tuple[str, ...] = ()

    @classmethod
    def named(cls, method: str) -> QuantizationConfig | None:
        """The config of a value of ``--quantization``."""
        if method == "none":
            return None
        return cls(library="bitsandbytes", bits=4) if method == "nf4" else cls(library="torchao", bits=8)

    @property
    def takes_pointwise(self) -> bool:
        """Whether pointwise convolutions are held as linear layers.

        bitsandbytes' 8-bit layers round their inputs too, by rows and but for outliers found over the batch; pixels in
        the place of tokens were not meant there.
        """
        return not (self.library == "bitsandbytes" and self.bits == 8)

    @property
    def name(self) -> str:
        """For people to read."""
        return f"{self.quant_type if self.bits == 4 else 'int8'} ({self.library})"

    def describe(self) -> dict[str, str]:
        """All of it as text, for a fingerprint."""
        return {name: str(value) for name, value in asdict(self).items()}

    def weight_bytes(self, rows: int, columns: int) -> int:
        """Bytes that the quantised weight of a linear layer takes, its scales included."""
        count = rows * columns
        if self.bits == 8:
            return count + 4 * rows
        scales = -(-count // BLOCK_SIZE)
        scale_bytes = scales + 4 * -(-scales // NESTED_BLOCK_SIZE) if self.double_quant else 4 * scales
        return -(-count // 2) + scale_bytes

    def layers(self, module: torch.nn.Module, within: Iterable[str], without: Iterable[str] = ()) -> list[str]:
        """Full names of the layers to quantise.

        Layers whose rows are no whole number of bitsandbytes' blocks are not quantised to 4 bits: on CPUs bitsandbytes
        (0.50) mixes up their scales. Among the presets' models there are none.

        Args:
            module: The transformer; its weights need not be loaded.
            within: Names of the blocks to look in.
            without: Names of layers to leave alone.
        """
        inside, left_out = tuple(f"{name}." for name in within), set(without)
        kept_in_float32 = getattr(module, "_keep_in_fp32_modules", None) or ()
        return [
            name
            for name, layer in module.named_modules()
            if (isinstance(layer, torch.nn.Linear) or self.takes_pointwise and is_pointwise(layer))
            and name.startswith(inside)
            and name not in left_out
            and (self.bits == 8 or layer.weight.shape[1] % BLOCK_SIZE == 0)
            and not set(name.split(".")) & set(kept_in_float32)
            and not any(part == name.rpartition(".")[2] or f"{part}." in f"{name}." for part in self.skipped_layers)
        ]


def is_pointwise(layer: torch.nn.Module) -> bool:
    """Whether a layer is a convolution that treats every pixel by itself, and all channels together."""
    return (
        isinstance(layer, torch.nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
    )


def read_quantization(method: str, config_path: str | None = None) -> QuantizationConfig | None:
    """How kept blocks are to be held.

    Args:
        method: Value of ``--quantization``, one of :data:`METHODS`.
        config_path: Value of ``--bnb_quantization_config_path``.

    Raises:
        UserError: one line that names the flag and the fix.
    """
    if config_path is None:
        config = QuantizationConfig.named(method)
        if config is not None:
            _check_installed(config.library, f"--quantization {method}")
        return config
    flag = f"--bnb_quantization_config_path {config_path}"
    if method != "none":
        raise UserError(f"{flag} and --quantization {method} both say how to quantise; give one of them.")
    return _from_bitsandbytes(_read_object(Path(config_path), flag), flag)


def _read_object(path: Path, flag: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{flag} cannot be read; name a JSON file.") from None
    except ValueError as error:
        raise UserError(f"{flag} is not JSON ({error}); correct the file.") from None
    if not isinstance(settings, dict):
        raise UserError(f'{flag} holds no JSON object; write one, like {{"load_in_4bit": true}}.')
    return settings


def _from_bitsandbytes(settings: dict[str, Any], flag: str) -> QuantizationConfig:
    """Turn keyword arguments of diffusers' ``BitsAndBytesConfig`` into a config."""
    from diffusers import BitsAndBytesConfig

    known = [name for name in inspect.signature(BitsAndBytesConfig.__init__).parameters if name != "kwargs"][1:]
    # What the class writes when it saves itself.
    unknown = sorted(set(settings) - {*known, *BitsAndBytesConfig._exclude_attributes_at_init})
    if unknown:
        raise UserError(f"{flag} has unknown keys: {', '.join(unknown)}; known ones are {', '.join(known)}.")
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if settings.get(name)]
    if len(asked) != 1:
        raise UserError(f"{flag} must set either load_in_4bit or load_in_8bit to true, and not both.")
    _check_installed("bitsandbytes", flag)
    try:
        parsed = BitsAndBytesConfig(**settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{flag} has a value that bitsandbytes cannot use: {error}.") from None
    if asked == ["load_in_4bit"] and parsed.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise UserError(f"{flag}: bnb_4bit_quant_type is '{parsed.bnb_4bit_quant_type}'; choose nf4 or fp4.")
    if parsed.llm_int8_has_fp16_weight:
        raise UserError(
            f"{flag}: llm_int8_has_fp16_weight keeps weights in 16 bits, which saves nothing; leave it out."
        )
    return QuantizationConfig(
        library="bitsandbytes",
        bits=4 if asked == ["load_in_4bit"] else 8,
        quant_type=parsed.bnb_4bit_quant_type,
        compute_dtype=parsed.bnb_4bit_compute_dtype,
        double_quant=parsed.bnb_4bit_use_double_quant,
        storage=parsed.bnb_4bit_quant_storage,
        threshold=parsed.llm_int8_threshold,
        skipped_layers=tuple(parsed.llm_int8_skip_modules or ()),
    )


def _check_installed(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{flag} needs a package that is not installed; run: pip install {package}")


def check_device(config: QuantizationConfig, device: torch.device | str, dtype: torch.dtype) -> None:
    """Quantise a small layer and train through it.

    Raises:
        UserError: if the library cannot do that on this device.
    """
    try:
        layer = quantize_layer(torch.nn.Linear(BLOCK_SIZE, BLOCK_SIZE, dtype=dtype), config, device)
        layer(torch.ones(2, BLOCK_SIZE, dtype=dtype, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # each library raises types of its own
        raise UserError(
            f"Quantisation to {config.name} does not work on this device ({device}): {first_line(error)}; leave "
            "--quantization or --bnb_quantization_config_path out."
        ) from error


def mark_quantized(transformer: torch.nn.Module, config: QuantizationConfig) -> None:
    """Tell peft which of bitsandbytes' layers it will meet."""
    if config.library == "bitsandbytes":
        setattr(transformer, f"is_loaded_in_{config.bits}bit", True)


def quantize_layer(
    layer: torch.nn.Linear | torch.nn.Conv2d, config: QuantizationConfig, device: torch.device | str
) -> torch.nn.Linear:
    """A frozen quantised layer on ``device`` with the weights of ``layer``, which must be on the CPU.

    Args:
        layer: A linear layer, or a convolution for which :func:`is_pointwise` holds.
        config: How its weights are held.
        device: Where it is to be.
    """
    layer.requires_grad_(False)
    linear = layer if isinstance(layer, torch.nn.Linear) else as_linear(layer)
    quantized = _with_torchao(linear.to(device)) if config.library == "torchao" else _with_bitsandbytes(linear, config)
    quantized = quantized.to(device).train(layer.training)
    return quantized if layer is linear else on_channels(quantized)


def move_weight(parameter: Any, device: torch.device | str) -> None:
    """Move a frozen weight in place, with what torchao and bitsandbytes hold beside or instead of its data.

    The device that torchao's weight names for itself stays; it is that of its parts before.
    """
    if is_traceable_wrapper_subclass(parameter):
        for part in parameter.__tensor_flatten__()[0]:
            setattr(parameter, part, getattr(parameter, part).to(device))
        return
    parameter.data = parameter.data.to(device)
    if getattr(parameter, "quant_state", None) is not None:
        parameter.quant_state.to(device)


def follow_weight(layer: Any) -> None:
    """Let an 8-bit layer of bitsandbytes refer to its moved weight, which it would keep a copy of otherwise."""
    for holder in (layer.weight, layer.state):
        if holder.CB is not None:
            holder.CB, holder.SCB = layer.weight.data, holder.SCB.to(layer.weight.device)


def as_linear(layer: torch.nn.Conv2d) -> torch.nn.Linear:
    """The linear layer that a pointwise convolution applies to every pixel; it shares the weights."""
    linear: Any = torch.nn.Linear(layer.in_channels, layer.out_channels, layer.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(layer.weight.data.flatten(1), requires_grad=False)
    linear.bias = layer.bias
    return linear


def on_channels(linear: torch.nn.Linear) -> torch.nn.Linear:
    """Let a linear layer take and give ``(batch, channels, height, width)``."""
    linear.register_forward_pre_hook(lambda _, args: (args[0].movedim(1, -1),))
    linear.register_forward_hook(lambda _, args, output: output.movedim(-1, 1))
    return linear


def _with_bitsandbytes(layer: torch.nn.Linear, config: QuantizationConfig) -> torch.nn.Linear:
    """bitsandbytes quantises when the layer is moved to its device."""
    # It says so in every forward when it casts an activation.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes as bnb

    weight, has_bias = layer.weight.data, layer.bias is not None
    quantized: Any
    if config.bits == 8:
        quantized = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            has_bias,
            has_fp16_weights=False,
            threshold=config.threshold,
            device="meta",
        )
        quantized.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        quantized = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            has_bias,
            config.compute_dtype or weight.dtype,
            compress_statistics=config.double_quant,
            quant_type=config.quant_type,
            quant_storage=config.storage,
            device="meta",
        )
        quantized.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=config.double_quant,
            quant_type=config.quant_type,
            quant_storage=config.storage,
            blocksize=BLOCK_SIZE,
            module=quantized,
        )
        # On some CPUs it would repack the weights at the first forward without gradients, for good and with scales
        # rounded to bfloat16, and what is repacked has no backward.
        quantized.support_avx512bf16_for_cpu = False
    quantized.bias = layer.bias
    quantized.register_forward_pre_hook(lambda layer, args: (as_autocast(args[0]), *args[1:]))
    return quantized


def as_autocast(input: torch.Tensor) -> torch.Tensor:
    """What autocast makes of a linear layer's input; libraries' layers return the dtype that they are given."""
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input


def _with_torchao(layer: torch.nn.Linear) -> torch.nn.Linear:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig(version=2))
    quantized = WeightOnlyLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    quantized.weight, quantized.bias = layer.weight, layer.bias
    return quantized


class WeightOnlyLinear(torch.nn.Linear):
    """A layer with a quantised weight of torchao, of which no dequantised copy is kept for backward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(as_autocast(input), self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """The product with a weight that does not train: autograd would keep torchao's dequantised copy."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        weight, dtype = ctx.weight, gradient.dtype
        # As in torchao's forward, the scales, one per row, are not multiplied into a copy of the weight.
        return (gradient * weight.scale.to(dtype).flatten()) @ weight.qdata.to(dtype), None, None
