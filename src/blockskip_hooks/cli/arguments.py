"""Command line of the training script: its parser, and the settings that a command line and its file hold."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from ..families import FAMILIES, Flag
from ..training.settings import TrainSettings
from ..utils.errors import UserError, one_line
from ..utils.files import expand_home
from .config_files import GONE, config_words
from .console import shipped
from .startup import OneLineParser, make_parser


DESCRIPTION = """\
DreamBooth-LoRA on a diffusion transformer, with part of its blocks skipped.

Without a model named it trains the small one that ships with the package; without photos, on those beside it.

Example:
    python train_dreambooth_blockskip.py --skip_blocks auto --output_dir dog \\
        --instance_data_dir my-photos --instance_prompt "a photo of sks dog" \\
        --validation_prompt "a photo of sks dog in the snow"
    python train_dreambooth_blockskip.py --config configs/flux-12gb.yaml --output_dir dog \\
        --instance_data_dir my-photos --instance_prompt "a photo of sks dog" \\
        --validation_prompt "a photo of sks dog in the snow"
"""


def printable_command(words: Sequence[str]) -> str:
    """A command line as it may be shown and repeated: quoted for a shell, without the token.

    ``--resume_from_checkpoint`` is left out: what repeats a run begins it anew.
    """
    shown, before = [], ""
    for word in words:
        name, given, _ = word.partition("=")
        if "--resume_from_checkpoint" not in (name, before):
            hidden = before == "--hub_token"
            shown.append("***" if hidden else f"{name}=***" if name == "--hub_token" and given else word)
        before = word
    return shlex.join(shown)


def family_flags() -> dict[str, Flag]:
    """The flags that some families own, by name; of several owners' descriptions the first one's."""
    flags: dict[str, Flag] = {}
    for family in FAMILIES.values():
        for flag in family.own_flags:
            flags.setdefault(flag.name, flag)
    return flags


def add_flags(parser: argparse._ActionsContainer, group: type, names: Collection[str] | None = None) -> None:
    """Give a parser, or a group of it, the flags of a group of settings.

    Args:
        parser: The parser.
        group: A class of :mod:`~blockskip_hooks.training.flags`.
        names: The only flags to give it; by default all.
    """
    for flag in fields(group):
        if names is None or flag.name in names:
            parser.add_argument(f"--{flag.name}", **flag.metadata)


def _family_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("flags of some model families").add_argument
    for name, own in sorted(family_flags().items()):
        owners = ", ".join(dict.fromkeys(f.name for f in FAMILIES.values() if own in f.own_flags))
        flag(f"--{name}", **{**own.settings, "help": f"{own.settings['help']} Only {owners}."})


def build_parser() -> OneLineParser:
    """Parser with the flags of the upstream DreamBooth-LoRA scripts of all families, and those of block skipping."""
    # Without abbreviations a command keeps its meaning when flags are added.
    parser = make_parser(DESCRIPTION)
    groups: Sequence[Any] = TrainSettings.__bases__
    for group in groups:
        add_flags(parser.add_argument_group(group.title), group)
    _family_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of a command line and of the file of its ``--config``, before a model has its say.

    The file's values come before the command line's as arguments do, so what is typed wins.

    Args:
        argv: Arguments without the program name, or None for those of the process.

    Returns:
        The settings. ``local_rank`` is the variable ``LOCAL_RANK`` where a launcher set it.

    A flag or a file that cannot be parsed ends the program with one line on stderr and code 2.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    defaults = vars(parser.parse_args([]))
    # argparse fills in a default only where the namespace has no value yet, so what stays was not typed.
    untyped = object()
    found = argparse.Namespace(**dict.fromkeys(defaults, untyped))
    in_file: frozenset[str] = frozenset()
    if (path := _config_file(words)) is not None:
        try:
            file_words, in_file = config_words(path, parser)
        except UserError as error:
            parser.exit(2, f"error: {one_line(str(error))}\n")
        parser.source = f"--config {path}: "
        parser.parse_args(file_words, found)
        parser.source = ""
    _, unknown = parser.parse_known_args(words, found)
    if unknown:
        _refuse_unknown(parser, unknown)
    typed = {name: value for name, value in vars(found).items() if value is not untyped}
    values = {**defaults, **typed}
    if values["validation_prompt"] is not None:
        values["validation_prompt"] = tuple(dict.fromkeys(values["validation_prompt"]))
    launcher_rank = os.environ.get("LOCAL_RANK", "-1")
    if launcher_rank != "-1":
        values["local_rank"] = int(launcher_rank)
    own = {field.name for field in fields(TrainSettings)} - {"given", "family_flags"}
    return TrainSettings(
        given=in_file | typed.keys(),
        family_flags={name: values[name] for name in family_flags()},
        **{name: values[name] for name in own},
    )


def _config_file(words: Sequence[str]) -> Path | None:
    """The file of ``--config``, if the command line names one; recipes of the package are found from every folder."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=expand_home)
    path = parser.parse_known_args(words)[0].config
    if path is not None and Path(path).parts[:1] == ("configs",) and not Path(path).exists():
        with contextlib.suppress(UserError):
            return shipped(Path(path).as_posix())
    return None if path is None else Path(path)


def _refuse_unknown(parser: OneLineParser, unknown: Sequence[str]) -> NoReturn:
    names = [word.split("=")[0] for word in unknown]
    for name in names:
        if (gone := name.removeprefix("--")) in GONE:
            parser.error(f"{name} is gone; {GONE[gone]}.")
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def apply_defaults(settings: TrainSettings, defaults: Mapping[str, Any]) -> TrainSettings:
    """The settings with the defaults of a model or family in place of those flags that the user did not give.

    Args:
        settings: From `parse_args`.
        defaults: Value by flag name without the dashes.

    Raises:
        ValueError: if a name is not a flag.
    """
    settings.with_values(defaults)
    return settings.with_values({name: value for name, value in defaults.items() if name not in settings.given})
