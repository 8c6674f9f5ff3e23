"""What a flag is, and what turns the text of a command line into a value or says what is wrong with the text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

from ...selection import parse_skip_blocks
from ...utils.errors import UserError


_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_TRUE_WORDS = ("true", "yes", "on", "1")
_FALSE_WORDS = ("false", "no", "off", "0")


def flag(default: Any, help: str, **settings: Any) -> Any:
    """A field of a group of settings that is a flag of the command line, under the field's name.

    Its metadata are the arguments of ``argparse``'s ``add_argument``.

    Args:
        default: Value of the flag when it is not given; ``False`` makes it a switch, and a number says its type.
        help: What it means.
        **settings: What the default does not say of it: ``type``, ``choices``, ``nargs``, ``action``.
    """
    if default is False:
        settings["action"] = "store_true"
    else:
        settings["default"] = default
        if isinstance(default, (int, float)):
            settings.setdefault("type", type(default))
    return field(metadata={"help": help, **settings})


def parse_bool(text: str) -> bool:
    """Turn the words true/yes/on/1 and false/no/off/0, in any case, into what they say.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    word = text.strip().lower()
    if word not in _TRUE_WORDS + _FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return word in _TRUE_WORDS


class ByteCount(int):
    """A number of bytes that shows as it was typed."""

    text: str

    def __str__(self) -> str:
        return self.text


def parse_bytes(text: str) -> ByteCount:
    """Number of bytes in a text like ``"8GB"`` (1e9), ``"500MiB"`` (2**20), ``"1.5 TB"`` or ``"1000000"``.

    Raises:
        UserError: if the text has another form, the amount is below one byte, or it has lost its unit.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UserError(f"'{text}' is not a number of bytes; write it like 8GB, 500MiB or 1000000.")
    if not match[2] and float(match[1]) < 1000:
        raise UserError(f"'{text}' is {text} bytes; write {text}GB or {text}MB.")
    # Whole numbers stay exact: a float has no room for every large byte count.
    count = ByteCount(int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit))
    count.text = text
    return count


def parse_cache(text: str) -> str | ByteCount:
    """``--stream_cache``: the words ``auto`` and ``none``, or a number of bytes."""
    word = text.strip().lower()
    return word if word in ("auto", "none") else parse_bytes(text)


def parse_names(text: str) -> tuple[str, ...]:
    """The names in a text that separates them by commas."""
    return tuple(name.strip() for name in text.split(","))


def parse_trackers(text: str) -> tuple[str, ...]:
    """The names in ``--report_to``, known or not; none for ``none``."""
    return () if text == "none" else tuple(dict.fromkeys(parse_names(text)))


def skip_blocks_text(text: str) -> str:
    """``--skip_blocks`` in one of its forms, without blanks around it and in lower case."""
    parse_skip_blocks(text)
    return text.strip().lower()


def argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function that reads a text as the type of a flag: what is wrong with the text becomes the parser's error."""

    def convert(text: str) -> Any:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty; give a value, or leave the flag out.")
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


SIZE, NAMES = argument_type(parse_bytes), argument_type(parse_names)
