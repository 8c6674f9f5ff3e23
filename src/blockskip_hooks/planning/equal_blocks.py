"""Runs of equal blocks: of each run three blocks are simulated, and the others follow by arithmetic.

A deep transformer repeats a few kinds of blocks. In a run of equal blocks each one does what its neighbour does, on
top of what the blocks before it have left in memory. So it is enough to simulate the first block of a run, the second
and the last: the second stands for every block between the first and the last, and what it adds to the live bytes is
added once more for each of them. Live bytes and FLOPs are those of the full depth, to the byte; what a caching
allocator reserves for them is within 10 % of it, because pieces of its segments come to lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch

from ..blocks import list_blocks, split_blocks
from ..config import BlockSkipConfig
from .counters import ALL_BLOCKS, Phase


SIMULATED = 3
"""Blocks of a run that are simulated: those at its ends have other neighbours, the second stands for all between."""
# The number of a layer among its siblings does not change what it costs.
_NUMBERS = frozenset({"layer_idx", "layer_id"})


@dataclass(frozen=True)
class Depth:
    """How a shortened model stands for the full one.

    Attributes:
        copies: How many blocks were taken out, by the name, in the shortened model, of the block that stands for them.
        names: Names in the shortened model of the blocks that are left, by the names that they had.
    """

    copies: Mapping[str, int]
    names: Mapping[str, str]

    def renamed(self, layers: Iterable[str], blocks: Iterable[str]) -> list[str]:
        """Names in the shortened model of those layers that are left.

        Args:
            layers: Names in the full model.
            blocks: Names of the full model's blocks.
        """
        every, left = set(blocks), []
        for layer in layers:
            block = next((name for name in _parents(layer) if name in every), None)
            if block is None:
                left.append(layer)
            elif block in self.names:
                left.append(self.names[block] + layer.removeprefix(block))
        return left

    def times(self, name: str) -> int:
        """How many parameters or layers of the full model one of the shortened model stands for."""
        return 1 + next((self.copies[parent] for parent in _parents(name) if parent in self.copies), 0)

    def in_full(self, phases: Sequence[Phase], resident_bytes: int) -> Phase:
        """All of a simulated piece of work, as the full model would do it.

        Args:
            phases: The work on the shortened model, block by block.
            resident_bytes: What the blocks that were taken out hold all the time.
        """
        bytes_before, peak, products, attention = resident_bytes, 0, 0, 0
        for phase in phases:
            copies = self.copies.get(phase.name or "", 0)
            # Live bytes grow or shrink by the same amount from copy to copy, so the first or the last has the peak.
            added = copies * phase.left_bytes
            peak = max(peak, bytes_before + phase.peak_bytes, bytes_before + added + phase.peak_bytes)
            bytes_before += added
            if phase.name == ALL_BLOCKS:
                freed = phase.freed_bytes.items()
                bytes_before -= sum(self.copies.get(block, 0) * num_bytes for block, num_bytes in freed)
            products += (1 + copies) * phase.product_flops
            attention += (1 + copies) * phase.attention_flops
        return Phase(None, peak, 0, products, attention)

    def grown(self, phases: Sequence[Phase]) -> list[int]:
        """Bytes that the blocks which were taken out have left by the end of each phase."""
        return list(accumulate(self.copies.get(phase.name or "", 0) * phase.left_bytes for phase in phases))

    def events_in_full(self, phases: Sequence[Phase]) -> list[tuple[int, int]]:
        """The allocations of a simulated piece of work, as the full model would make them.

        What a block does, those that it stands for do as well, in forward after it and in backward before it. Each
        frees its own tensors, and of its neighbour what the simulated block frees of its own neighbour.

        Args:
            phases: The work on the shortened model, block by block.
        """
        return _Repeated(self, phases).events()


class _Repeated:
    """The allocations of phases, some of them repeated; an allocation is told by its number and by its copy's."""

    def __init__(self, depth: Depth, phases: Sequence[Phase]) -> None:
        self._phases = phases
        self._copies = [depth.copies.get(phase.name or "", 0) for phase in phases]
        self._stride = max(self._copies, default=0) + 1
        names = [phase.name for phase in phases]
        blocks = [index for index, name in enumerate(names) if name not in (None, ALL_BLOCKS)]
        seen_again = (index for index in blocks if names[index] in names[:index])
        self._backward_from = next(seen_again, len(phases))
        self._made: dict[int, int] = {}
        self._freed: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        for index, phase in enumerate(phases):
            for number, size in phase.events:
                if size:
                    self._made[number], self._sizes[number] = index, size
                else:
                    self._freed[number] = index
        self._partners = self._find_partners(set(blocks))
        self._alive: dict[int, set[int]] = {}

    def _is_backward(self, index: int) -> bool:
        return index >= self._backward_from

    def _find_partners(self, blocks: set[int]) -> dict[int, int]:
        """For what a repeated block frees of its neighbour: what it leaves in turn for its own copy to free."""
        wanted: dict[Hashable, list[int]] = {}
        left: dict[Hashable, list[int]] = {}
        for number, freed in self._freed.items():
            made = self._made[number]
            if self._phases[made].name == self._phases[freed].name:
                continue
            key = self._is_backward(made), self._is_backward(freed), self._sizes[number]
            if self._copies[freed]:
                wanted.setdefault((self._phases[freed].name, *key), []).append(number)
            elif self._copies[made] and freed in blocks:
                left.setdefault((self._phases[made].name, *key), []).append(number)
        return {one: other for key, numbers in wanted.items() for one, other in zip(numbers, left.get(key, ()))}

    def events(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        for index, phase in enumerate(self._phases):
            copies = range(self._copies[index] + 1)
            for copy in reversed(copies) if self._is_backward(index) else copies:
                for number, size in phase.events:
                    if size:
                        self._alive.setdefault(number, set()).add(copy)
                        done.append((number * self._stride + copy, size))
                        continue
                    for freed, of in self._frees(index, copy, number):
                        if of in self._alive.get(freed, ()):
                            self._alive[freed].remove(of)
                            done.append((freed * self._stride + of, 0))
        return done

    def _frees(self, index: int, copy: int, number: int) -> list[tuple[int, int]]:
        """Which allocations a copy of a phase frees where the simulated phase frees ``number``."""
        made, copies = self._made[number], self._copies[index]
        backward = self._is_backward(made)
        if self._phases[made].name == self._phases[index].name:
            return [(number, copy)]
        if copies:
            if copy == (copies if backward else 0):
                return [(number, 0)]
            partner = self._partners.get(number)
            return [] if partner is None else [(partner, copy + 1 if backward else copy - 1)]
        if number in self._partners.values():
            return [(number, 0 if backward else self._copies[made])]
        return [(number, of) for of in sorted(self._alive.get(number, ()))]


def shorten(model: torch.nn.Module, blocks: Iterable[tuple[str, Hashable]]) -> Depth:
    """Take blocks out of a model whose cost follows from that of their neighbours.

    Args:
        model: The model; its lists of blocks are changed in place.
        blocks: Name of each block in execution order, such as ``"transformer_blocks.3"``, and what tells its kind;
            blocks of one list that follow each other and are of the same kind are a run.
    """
    copies: dict[str, int] = {}
    names: dict[str, str] = {}
    for stack, in_stack in groupby(blocks, key=lambda block: block[0].rpartition(".")[0]):
        modules: Any = model.get_submodule(stack)
        unwanted: list[int] = []
        position = 0
        for _, run in groupby(list(in_stack), key=lambda block: block[1]):
            length = len(list(run))
            spare = max(0, length - SIMULATED)
            for number in range(length):
                if 2 <= number < 2 + spare:
                    unwanted.append(position + number)
                else:
                    names[f"{stack}.{position + number}"] = f"{stack}.{position + number - len(unwanted)}"
                    if number == 1 and spare:
                        copies[f"{stack}.{position + number - len(unwanted)}"] = spare
            position += length
        for index in reversed(unwanted):
            del modules[index]
    return Depth(copies, names)


def shorten_spans(
    transformer: torch.nn.Module,
    stacks: Sequence[str] | None,
    config: BlockSkipConfig,
    layers: Mapping[str, Sequence[str]],
) -> tuple[Depth, BlockSkipConfig]:
    """Take blocks that are like their neighbours out of a transformer; the rest of the spans goes with them.

    Args:
        transformer: Without weights, LoRA or placeholders; changed in place.
        stacks: See :func:`~blockskip_hooks.blocks.list_blocks`.
        config: The spans to skip.
        layers: Names of layers that are treated in some way; blocks are equal if the same layers of them are.
    """
    spans = split_blocks(list_blocks(transformer, stacks), config)
    parts = {"leading": spans.leading, "kept": spans.kept, "trailing": spans.trailing}

    def treated(block: str) -> Iterator[tuple[str, str]]:
        for treatment, names in layers.items():
            yield from ((treatment, n.removeprefix(block)) for n in names if n.startswith(f"{block}."))

    depth = shorten(
        transformer,
        [
            (block.name, (part, kind_of(block.module), frozenset(treated(block.name))))
            for part, blocks in parts.items()
            for block in blocks
        ],
    )
    left = {part: sum(block.name in depth.names for block in blocks) for part, blocks in parts.items()}
    return depth, BlockSkipConfig(leading=left["leading"], trailing=left["trailing"], residuals=config.residuals)


def kind_of(block: torch.nn.Module) -> Hashable:
    """What decides a block's cost: its modules' classes and plain settings, and the shapes of their tensors."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, (bool, int, float, str)) and key not in _NUMBERS
            ),
            tuple(
                (key, None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad))
                for tensors in (module._parameters, module._buffers)
                for key, tensor in tensors.items()
            ),
        )
        for name, module in block.named_modules()
    )


def _parents(name: str) -> Iterable[str]:
    """``a.b.c`` to ``a``, ``a.b``."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))
