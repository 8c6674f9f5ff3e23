"""An ordered view of a diffusion transformer's blocks.

Blocks are read from the module tree in the order the model declares its stacks, which for every supported model is
the order in which it runs them. diffusers' own tuple of stack names comes from a set and changes order between
processes, so it is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch.distributed.fsdp import FSDPModule

from .config import BlockSkipConfig
from .layouts import BlockLayout, layout_of
from .utils.errors import UserError


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        index: Position in execution order, ``0 .. N-1``.
        name: Qualified name in the model, for example ``"single_transformer_blocks.3"``.
        module: The block itself.
        metadata: Which arguments and outputs are hidden and encoder hidden states.
        only: The one kind of tokens that the block sees; ``None`` for both. A block that sees the text alone has it as
            its hidden states.
    """

    index: int
    name: str
    module: torch.nn.Module
    metadata: TransformerBlockMetadata
    only: Literal["image", "text"] | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of tokens that the block sees."""
        return frozenset(("image", "text") if self.only is None else (self.only,))


@dataclass(frozen=True)
class BlockSpans:
    """The blocks of a transformer split by a :class:`BlockSkipConfig`; each part is in execution order."""

    leading: tuple[Block, ...]
    kept: tuple[Block, ...]
    trailing: tuple[Block, ...]

    @property
    def skipped(self) -> tuple[Block, ...]:
        """The blocks of both spans."""
        return self.leading + self.trailing

    @property
    def shares_text(self) -> bool:
        """Whether the text after the leading span is that of the prompt: none of its blocks sees the image as well."""
        return any(block.only == "text" for block in self.leading) and all(block.only for block in self.leading)


def _lists(module: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    return {name: child for name, child in module.named_children() if isinstance(child, torch.nn.ModuleList)}


def _stack(module: torch.nn.Module, name: str) -> torch.nn.ModuleList | None:
    """The list of this name, which may lie deeper than an attribute."""
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, torch.nn.ModuleList) else None


def _as_block(
    index: int, stack: str, position: int, module: torch.nn.Module, layouts: Mapping[str, BlockLayout]
) -> Block | None:
    """A module of a stack as a block; ``None`` if neither ``layouts`` nor diffusers knows it."""
    name = f"{stack}.{position}"
    # torch's FSDP gives a module it divides a class of its own, whose second base is the module's.
    block_class = type(module).__bases__[1] if isinstance(module, FSDPModule) else type(module)
    layout = layouts.get(stack) or layouts.get(block_class.__name__)
    if layout is not None:
        described = asdict(layout)
        only = described.pop("only")
        return Block(index, name, module, TransformerBlockMetadata(**described, _cls=block_class), only)
    try:
        return Block(index, name, module, TransformerBlockRegistry.get(block_class))
    except ValueError:
        return None


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several; a string is one, not its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def list_blocks(transformer: torch.nn.Module, stacks: str | Sequence[str] | None = None) -> tuple[Block, ...]:
    """List the blocks of ``transformer`` in execution order.

    Args:
        transformer: A diffusers transformer.
        stacks: Names of the block stacks in execution order, for models that declare other stacks of the
            same block class as well (refiners, say). By default those that the model's family announced; of a model
            of no supported family, every ``ModuleList`` of registered blocks.

    Raises:
        ValueError: if it is no transformer or lacks a named stack, a module of a stack is no block that the model's
            family or diffusers' ``TransformerBlockRegistry`` knows, or there are no blocks.

    Example:
        >>> [block.name for block in list_blocks(transformer)]
        ['transformer_blocks.0', 'transformer_blocks.1', 'single_transformer_blocks.0', ...]
    """
    if not isinstance(transformer, torch.nn.Module):
        raise UserError(
            f"A {type(transformer).__name__} is no transformer; give a loaded one, a pipeline's `.transformer` say."
        )
    layout = layout_of(type(transformer))
    stacks = layout.stacks if stacks is None else as_names(stacks)
    lists = _lists(transformer)
    blocks: list[Block] = []
    for stack_name in stacks if stacks is not None else lists:
        stack = _stack(transformer, stack_name)
        if stack is None:
            raise UserError(
                f"{type(transformer).__name__} has no stack of blocks '{stack_name}'; name some of {', '.join(lists)}."
            )
        found = [_as_block(len(blocks) + at, stack_name, at, part, layout.blocks) for at, part in enumerate(stack)]
        if stacks is None and not any(found):
            continue  # Another kind of list.
        for position, block in enumerate(found):
            if block is None:
                raise UserError(
                    f"{stack_name}.{position} is a {type(stack[position]).__name__}, which diffusers' "
                    "TransformerBlockRegistry does not know as a block; register its class, or name other stacks."
                )
            blocks.append(block)
    if not blocks:
        inside = [name for name, child in transformer.named_modules() if name and _lists(child)]
        if inside:
            raise UserError(
                f"{type(transformer).__name__} is a wrapper without blocks of its own; give what it wraps, "
                f"its `.{inside[0]}`."
            )
        raise UserError(
            f"{type(transformer).__name__} has no stack of blocks that diffusers' TransformerBlockRegistry knows; "
            "register its block class first."
        )
    return tuple(blocks)


def idle_modules(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """By name the modules that no image without a reference needs, as the model's family announced them."""
    found = {}
    for name in layout_of(type(transformer)).idle:
        module = transformer.get_submodule(name)
        parts = module.named_children() if isinstance(module, torch.nn.ModuleList) else [("", module)]
        found.update({f"{name}.{part}".rstrip("."): child for part, child in parts})
    return found


def block_bytes(blocks: Sequence[Block], dtype: torch.dtype) -> list[int]:
    """Bytes of each block's parameters in ``dtype``."""
    return [sum(p.numel() for p in block.module.parameters()) * dtype.itemsize for block in blocks]


def modulation_layers(spans: BlockSpans, names: Sequence[str]) -> tuple[str, ...]:
    """Qualified names of the kept blocks' linear layers whose full name inside their block is one of ``names``."""
    return tuple(
        f"{block.name}.{name}"
        for block in spans.kept
        for name, module in block.module.named_modules()
        if name in names and isinstance(module, torch.nn.Linear)
    )


def split_blocks(blocks: Sequence[Block], config: BlockSkipConfig) -> BlockSpans:
    """Split ``blocks`` into leading span, kept blocks and trailing span.

    Raises:
        ValueError: if no block would be kept, or ``config`` is something else.
    """
    if not isinstance(config, BlockSkipConfig):
        raise UserError(f"{config!r} does not say what to skip; give BlockSkipConfig(leading=..., trailing=...).")
    config.validate_for(len(blocks))
    first_trailing = len(blocks) - config.trailing
    return BlockSpans(
        leading=tuple(blocks[: config.leading]),
        kept=tuple(blocks[config.leading : first_trailing]),
        trailing=tuple(blocks[first_trailing:]),
    )
