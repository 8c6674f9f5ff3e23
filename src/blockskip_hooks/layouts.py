"""How a transformer's blocks are found and called, where diffusers does not say it.

Each model family registers the layout of its transformer here under the name of its class, so that the method needs no
family, and a family's file is read only when one of its transformers is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """How blocks of one class are called and what they return, as in diffusers' ``TransformerBlockMetadata``.

    Attributes:
        only: The one kind of tokens that a block sees and returns, where it does not see both. Blocks that see the
            text alone compute the same for every sample of a prompt, whatever its timestep.
    """

    return_hidden_states_index: int = 0
    return_encoder_hidden_states_index: int | None = None
    hidden_states_argument_name: str = "hidden_states"
    only: Literal["image", "text"] | None = None


@dataclass(frozen=True)
class TransformerLayout:
    """Where the blocks of a transformer are.

    Attributes:
        stacks: Names of its block stacks in execution order; ``None`` for every stack of known blocks.
        blocks: Layouts of block classes by class name, for classes that diffusers does not know or describes wrongly;
            by a stack's name where stacks of one class differ.
        idle: Names of modules, and of lists of them, that run for images of reference only: they hold no weights but
            while they run.
    """

    stacks: tuple[str, ...] | None = None
    blocks: Mapping[str, BlockLayout] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


_ANNOUNCED: dict[str, Callable[[], TransformerLayout]] = {}


def announce_transformer(class_name: str, layout: Callable[[], TransformerLayout]) -> None:
    """Say how transformers of a class, and of classes derived from it, are laid out.

    Importing the package announces the transformers of all families. A second announcement of a class has no effect.

    Args:
        class_name: Name of the class.
        layout: Called when a transformer of the class is met.
    """
    _ANNOUNCED.setdefault(class_name, layout)


def layout_of(transformer_class: type) -> TransformerLayout:
    """What was announced of a transformer's class or its nearest base; otherwise what holds without any word."""
    for base in transformer_class.__mro__:
        if base.__name__ in _ANNOUNCED:
            return _ANNOUNCED[base.__name__]()
    return TransformerLayout()
