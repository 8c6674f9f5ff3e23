"""Settings in a YAML file: flag names as keys, checked like flags, with the file and the key named where one is wrong.

YAML reads some words otherwise than a shell does. Where no other meaning is possible they are taken as the flag means
them: ``1e-4`` is a number, ``no`` under a flag that has the choice is that word, and ``10`` under a flag that takes
text is that text.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


# A file says how to train. It cannot lead to other files, and what a launcher sets is not a setting.
NOT_IN_FILES = ("help", "config", "dump_config", "local_rank")
_ACCELERATE_KEYS = {"compute_environment", "distributed_type", "num_machines"}


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings of a file, in the types that the parser gives its flags.

    Args:
        path: The file, as UTF-8.
        parser: Knows the flags.

    Returns:
        Value by flag name, of the keys that have one; ``null`` leaves a flag as if it was not there.

    Raises:
        ValueError: one line that names the file and the key.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not UTF-8 text; save it as such.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it has characters that text does not have"
        raise ValueError(f"--config {path} is no YAML{place}: {problem}.") from error
    except RecursionError as error:
        raise ValueError(f"--config {path} is nested too deeply for settings.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds no settings; write them like rank: 16, one a line.")
    if settings.keys() & _ACCELERATE_KEYS:
        raise ValueError(
            f"--config {path} is a config of accelerate; give it by accelerate launch --config_file {path}, before "
            "the script's name."
        )
    actions = {action.dest: action for action in _settings(parser)}
    values = {}
    for key, value in settings.items():
        if key not in actions:
            close = difflib.get_close_matches(str(key).lstrip("-"), actions, n=1)
            hint = f"did you mean {close[0]}?" if close else "keys are flags without the dashes."
            raise ValueError(f"--config {path}: {key} is no setting; {hint}")
        if value is not None:
            values[key] = _checked(actions[key], value, path)
    return values


def _settings(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    return (action for action in parser._actions if action.dest not in NOT_IN_FILES)


def _checked(action: argparse.Action, value: Any, path: Path) -> Any:
    """A value as the flag's type.

    Raises:
        ValueError: if it has another type, or is none of the choices.
    """
    wrong = ValueError(f"--config {path}: {action.dest} is {value!r}; give {_wanted(action)}.")
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is (action.type or str) for item in items):
            raise wrong
        return items
    if action.nargs == 0 or getattr(action.type, "__name__", "") == "parse_bool":
        if not isinstance(value, bool):
            raise wrong
        return value
    if value is False and action.choices and "no" in action.choices:
        value = "no"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    if action.type is int:
        if not isinstance(value, int):
            raise wrong
    elif action.type is float:
        try:
            value = float(value)
        except ValueError:
            raise wrong from None
    else:
        value = str(value)
    if action.choices is not None and value not in action.choices:
        raise wrong
    return value


def _wanted(action: argparse.Action) -> str:
    if action.nargs == "+":
        return "a list of whole numbers" if action.type is int else "a list of words"
    if action.nargs == 0 or getattr(action.type, "__name__", "") == "parse_bool":
        return "true or false"
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    if action.type in (int, float):
        return "a whole number" if action.type is int else "a number"
    return "a text, in quotes"


def dump_config(args: argparse.Namespace, parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> str:
    """The complete settings as a file that :func:`read_config` reads as the same run.

    Settings that were given are in force. All others are comments with the value that they have now: written as
    settings they would count as given, and overrule what a model's family prefers.

    Args:
        args: From :func:`~blockskip_hooks.cli.arguments.parse_args`.
        parser: Knows the flags and their groups.
        defaults: What the model and its family put in place of the flags' own defaults, as far as it is known.
    """
    lines = []
    for group in parser._action_groups:
        known = [action for action in group._group_actions if action.dest not in NOT_IN_FILES]
        lines += ["", f"# {group.title}"] if known else []
        for action in known:
            name = action.dest
            # A token does not belong into a file that is meant to be shared.
            given = name in args.given and name != "hub_token"
            value = getattr(args, name) if given else defaults.get(name, action.default)
            lines.append(f"{'' if given else '# '}{name}: {_on_one_line(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _on_one_line(value: Any) -> str:
    # Other styles than that of double quotes keep the line breaks of a text.
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, width=10**6, allow_unicode=True, default_flow_style=True, default_style=style)
    return text.removesuffix("...\n").strip()
