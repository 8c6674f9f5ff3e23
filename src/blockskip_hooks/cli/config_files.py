"""Settings in a YAML file: flag names as keys, checked like flags, with the file and the key named where one is wrong.

Each key becomes an argument, and the command line's own come after those. YAML reads some words otherwise than a shell
does: ``no`` under a flag that has the choice is that word, and ``10`` under a flag that takes text is that text.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..training.flags.types import parse_bool
from ..training.settings import TrainSettings
from ..utils.errors import UserError
from .console import shipped


# A file says how to train. It cannot lead to other files, and what a launcher sets is not a setting.
NOT_IN_FILES = ("help", "config", "dump_config", "local_rank")
# Flags that went, and what does their work.
GONE = {
    "select_on": "measure once with blockskip select, and --skip_blocks auto finds its table",
    "selection_encoder": "give --encoder to blockskip select",
    "probe_steps": "train a short run and give its LoRA to blockskip select by --lora_weights",
}
_ACCELERATE_KEYS = {"compute_environment", "distributed_type", "num_machines"}


def config_words(path: Path, parser: argparse.ArgumentParser) -> tuple[list[str], frozenset[str]]:
    """The settings of a file as words of a command line.

    Args:
        path: The file, as UTF-8.
        parser: Knows the flags.

    Returns:
        The words, and the names of the flags that the file sets. A key with ``null`` is as if it was not there.

    Raises:
        UserError: one line that names the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except OSError as error:
        hint = _recipes_like(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"--config {path} cannot be read: {error.strerror}{hint}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not UTF-8 text; save it as such.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it has characters that text does not have"
        raise UserError(f"--config {path} is no YAML{place}: {problem}.") from error
    except RecursionError as error:
        raise UserError(f"--config {path} is nested too deeply for settings.") from error
    if settings is None and text.strip():
        settings = {}  # All comments: what --dump_config prints where everything is as by default.
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} holds no settings; write them like rank: 16, one a line.")
    if settings.keys() & _ACCELERATE_KEYS:
        raise UserError(
            f"--config {path} is a config of accelerate; give it by accelerate launch --config_file {path}, before "
            "the script's name."
        )
    actions = {action.dest: action for action in parser._actions if action.dest not in NOT_IN_FILES}
    words: list[str] = []
    for key, value in settings.items():
        if key in GONE:
            raise UserError(f"--config {path}: {key} is gone; {GONE[key]}.")
        if key not in actions:
            close = difflib.get_close_matches(str(key).lstrip("-"), actions, n=1)
            hint = f"did you mean {close[0]}?" if close else "keys are flags without the dashes."
            raise UserError(f"--config {path}: {key} is no setting; {hint}")
        if value is not None:
            words += _words(actions[key], value, path)
    return words, frozenset(key for key, value in settings.items() if value is not None)


def _recipes_like(path: Path) -> str:
    """Recipes of the package whose names are close to that of a file that is not there."""
    try:
        folder = shipped("configs/flux.yaml").parent
    except UserError:
        return ""
    close = difflib.get_close_matches(path.name, sorted(file.name for file in folder.glob("*.yaml")), n=5)
    return f"; recipes with such a name: {', '.join(f'configs/{name}' for name in close)}" if close else ""


def _words(action: argparse.Action, value: Any, path: Path) -> list[str]:
    """A flag with a value as words of a command line.

    Raises:
        UserError: if the value is of a kind that no word is, or a truth where the flag takes none.
    """
    flag, is_list = action.option_strings[0], action.nargs == "+"
    wrong = f"--config {path}: {action.dest} is {value!r}; give "
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{wrong}true or false.")
        # A switch that has a word for off has it second.
        return [flag] if value else list(action.option_strings[1:])
    items = value if is_list and isinstance(value, list) else [value]
    takes_no = "no" in (action.choices or ()) or action.type is parse_bool
    texts = []
    for item in items:
        if isinstance(item, bool):
            if not takes_no or (item and action.choices):
                raise UserError(f"{wrong}a number, or a text in quotes.")
            texts.append("yes" if item else "no")
        elif isinstance(item, (int, float, str)):
            texts.append(str(item))
        else:
            raise UserError(f"{wrong}{'a list of' if is_list else ''} numbers or texts; quote a text.")
    # Behind an equals sign a value may begin with a dash.
    return [flag, *texts] if is_list else [f"{flag}={texts[0]}"]


def dump_config(settings: TrainSettings, parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> str:
    """The complete settings as a file that :func:`config_words` reads as the same run.

    Settings that were given are in force. All others are comments with the value that they have now: written as
    settings they would count as given, and overrule what a model's family prefers.

    Args:
        settings: From :func:`~blockskip_hooks.cli.arguments.parse_args`.
        parser: Knows the flags and their groups.
        defaults: What the model and its family put in place of the flags' own defaults, as far as it is known.
    """
    lines, values = [], settings.plain()
    for group in parser._action_groups:
        known = [action for action in group._group_actions if action.dest not in NOT_IN_FILES]
        lines += ["", f"# {group.title}"] if known else []
        for action in known:
            name = action.dest
            # A token does not belong into a file that is meant to be shared.
            given = name in settings.given and name != "hub_token"
            value = values[name] if given else defaults.get(name, action.default)
            lines.append(f"{'' if given else '# '}{name}: {_on_one_line(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _on_one_line(value: Any) -> str:
    # Other styles than that of double quotes keep the line breaks of a text.
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, width=10**6, allow_unicode=True, default_flow_style=True, default_style=style)
    return text.removesuffix("...\n").strip()
