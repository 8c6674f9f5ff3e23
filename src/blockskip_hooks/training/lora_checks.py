"""Whether LoRA learns, and what of a model trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError


logger = logging.getLogger(__name__)


def check_gradients(*models: torch.nn.Module) -> None:
    """After the first backward: every LoRA must be reached (its B has a gradient; A's is zero while B is).

    Raises:
        UserError: naming the first layer that is not.
    """
    gradients = [(name, parameter.grad) for name, parameter in _trained(models) if "lora_B" in name]
    reached = _any([gradient for _, gradient in gradients if gradient is not None])
    for name, gradient in gradients:
        if gradient is None or not reached.pop(0):
            raise UserError(
                f"The LoRA of {_layer(name)} receives no gradient, so it would never learn; leave the layer out of "
                "--lora_layers, or report this as a bug."
            )


def warn_unless_learned(*models: torch.nn.Module) -> None:
    """After training: warn of LoRA that is still at zero. All of it is saved; what the rest learnt is not lost."""
    for model in models:
        zero = [_layer(name) for name, p in _trained([model]) if "lora_B" in name and not bool(p.any())]
        if zero:
            logger.warning(
                "The LoRA of %s%s is still zero after training: nothing was learnt there. Raise --learning_rate, or "
                "leave these layers out of --lora_layers.",
                zero[0],
                f" and {len(zero) - 1} other layers" if len(zero) > 1 else "",
            )


def check_finite(*models: torch.nn.Module) -> None:
    """Before anything is saved: no LoRA may hold a value that is not finite.

    Raises:
        UserError: naming the first layer.
    """
    for name, parameter in _trained(models):
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"The LoRA of {_layer(name)} is not finite; lower --learning_rate. Checkpoints written so far are "
                "intact."
            )


def _trained(models: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The LoRA that trains, of all models, with its parameters' names."""
    for model in models:
        yield from ((name, p) for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)


def _any(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each has a value that is not zero, in one read of the device."""
    return torch.stack([tensor.any() for tensor in tensors]).tolist() if tensors else []


def _layer(parameter_name: str) -> str:
    return parameter_name.partition(".lora_")[0]


def describe_trainable(model: DiTBlockSkipTransformer, targets: Sequence[str]) -> str:
    """One line that says what trains in the transformer: how many parameters, in how many layers of which blocks.

    Args:
        model: The transformer, LoRA added.
        targets: Full names of the layers with LoRA.
    """
    blocks = [block for block in model.spans.kept if any(name.startswith(f"{block.name}.") for name in targets)]
    stacks: dict[str, list[int]] = {}
    for block in blocks:
        stack, _, number = block.name.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    places = [f"{stack} {_ranges(numbers)}" for stack, numbers in stacks.items()]
    inside = tuple(f"{block.name}." for block in blocks)
    outside = sum(not name.startswith(inside) for name in targets)
    places += [f"{outside} layers outside the blocks"] if outside else []
    total = len(model.spans.kept) + len(model.spans.skipped)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return (
        f"{count:,} LoRA parameters in {len(targets)} layers of {len(blocks)} of {total} blocks: {', '.join(places)}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, runs of them as ranges: ``0-4, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
