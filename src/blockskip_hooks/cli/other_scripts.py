"""Flags that scripts other than training have for the model and its images."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..families import Family
from ..families.facts import CONDITION_FLAGS
from ..inference.streamed_model import ImageFlags
from ..training.flags.model import MachineFlags, ModelFlags
from ..utils.files import expand_home
from .arguments import add_flags


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name the model and how it is read, with the meaning that they have in training."""
    add_flags(parser, ModelFlags, ("pretrained_model_name_or_path", "revision", "variant"))
    flag = parser.add_argument
    flag("--cache_dir", type=expand_home, help="Where downloaded models are kept; default: the hub's cache.")
    flag("--hub_token", help="Token for the download; default: that of hf auth login, which is safer.")
    flag("--max_sequence_length", type=int, help="Tokens of a prompt; default: that of the model.")
    add_flags(parser, MachineFlags, ("mixed_precision",))


def condition_note(family: Family) -> str:
    """A line of the first screen for models that take condition images; nothing for others."""
    if CONDITION_FLAGS[0] not in family.own_flags:
        return ""
    return "\nNote     images are made of prompts alone; condition images that a LoRA was trained with are not used"


def image_flags(args: argparse.Namespace) -> ImageFlags:
    """What the parsed flags of a script say about the model and its images."""
    return ImageFlags(**{field.name: getattr(args, field.name, None) for field in fields(ImageFlags)})
