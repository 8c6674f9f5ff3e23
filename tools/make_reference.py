#!/usr/bin/env python
"""Write the pages of ``docs/`` that come from the code; ``--check`` says whether they are fresh.

``reference.md`` is made of the docstrings of the package's public names, ``flags.md`` of the training script's parser
and of the flags of diffusers' scripts in ``tests/flags``.

Example:
    python tools/make_reference.py
"""

from __future__ import annotations

import argparse
import enum
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blockskip_hooks
from blockskip_hooks.cli.arguments import build_parser


ROOT = Path(__file__).parents[1]
FLAGS_HEAD = """# Flags

Made from the parser by `python tools/make_reference.py`. `blockskip train --help` prints the same.

*From* says whose flag it is: *diffusers* where all of the upstream scripts that we compare have it, or all but
some; the names of the scripts where a few do; *ours* where none does. A flag of *diffusers* has upstream's name, type,
default and effect. Families that a flag is not for refuse it in one line. A switch is off unless it is given. Flags
may also be keys of a file, see `--config`.
"""
HEAD = """# Reference

Made from the docstrings by `python tools/make_reference.py`.

One package is public, `blockskip_hooks` itself, with the names on this page. They change as
[semantic versions](https://semver.org) say, and [CHANGELOG.md](../CHANGELOG.md) lists each change. The packages in it
(`{rooms}`) are internal: what they hold may change
in any version. [architecture.md](architecture.md) says what each is for.

Each name is loaded when it is first used: `import blockskip_hooks` alone loads neither torch nor diffusers.
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_ORDER = (
    *("BlockSkipConfig", "DiTBlockSkipTransformer", "SpanResiduals", "lora_targets", "list_blocks", "Block"),
    *("BlockSpans", "apply_block_skip", "remove_block_skip", "BlockSkipState", "SkipMode", "PatchSamplingConfig"),
    *("patch_size_for", "QuantizationConfig", "CaptureDone", "UserError"),
    *("embedded_model", "embedded_pipeline", "embedded_photos", "embedded_subjects"),
)


def markdown(docstring: str) -> str:
    """A docstring of the house's style as Markdown: sections become lists, examples code, roles plain names."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda m: f"`{m[1].rsplit('.', 1)[-1]}`", docstring).replace("``", "`")
    lines, section = [], ""
    for line in text.splitlines():
        word = line.rstrip(":")
        if line.endswith(":") and (word in _SECTIONS or word == "Example"):
            section = word
            lines += [f"**{word}**", ""] + (["```pycon"] if word == "Example" else [])
        elif section == "Example":
            lines.append(line.removeprefix("    "))
        elif section and line.startswith("    "):
            body = line[4:]
            if body.startswith(" "):
                lines[-1] += f" {body.strip()}"
            elif section in ("Args", "Attributes", "Raises"):
                name, _, rest = body.partition(": ")
                lines.append(f"- `{name}`: {rest}")
            else:
                lines.append(body)
        else:
            section = section if line == "" else ""
            lines.append(line)
    if section == "Example":
        lines.append("```")
    return "\n".join(lines)


class _Annotation(str):
    """An annotation that shows as it was written."""

    def __repr__(self) -> str:
        return str(self)


def signature(thing: Any) -> str:
    """How it is called."""
    found = inspect.signature(thing)
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=_Annotation(p.annotation))
        for p in found.parameters.values()
    ]
    returned = found.return_annotation
    if returned is not found.empty:
        returned = _Annotation(returned)
    return str(found.replace(parameters=parameters, return_annotation=returned)).removesuffix(" -> None")


def members(cls: type) -> list[tuple[str, Any]]:
    """Public methods and properties that the class itself defines, in order."""
    kinds = (property, classmethod, staticmethod)
    return [
        (name, value)
        for name, value in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


def describe(name: str) -> str:
    """One public name's part of the page."""
    thing = getattr(blockskip_hooks, name)
    parts = [f"## {name}", f"`from blockskip_hooks import {name}`"]
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return "\n\n".join([*parts, markdown(inspect.getdoc(thing) or "")])
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        parts.append(f"```python\n{name}{signature(thing)}\n```")
    parts.append(markdown(inspect.getdoc(thing) or ""))
    for member, value in members(thing) if inspect.isclass(thing) else ():
        if isinstance(value, property):
            heading, called = f"### {name}.{member}", ""
        else:
            heading, called = f"### {name}.{member}()", f"{member}{signature(getattr(thing, member))}"
        parts.append(heading)
        if called:
            parts.append(f"```python\n{called}\n```")
        parts.append(markdown(inspect.getdoc(getattr(thing, member)) or ""))
    return "\n\n".join(parts)


def upstream_flags() -> dict[str, list[str]]:
    """Names of diffusers' scripts by flag, from what they were when their flags were last read."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests" / "flags").glob("flags_*.json")):
        for entry in json.loads(file.read_text()):
            found.setdefault(entry["name"], []).append(file.stem.removeprefix("flags_"))
    return found


def _source(owners: list[str], scripts: set[str]) -> str:
    others = sorted(scripts - set(owners))
    if not owners:
        return "ours"
    if len(others) <= 3:
        return "diffusers" + (f", not {', '.join(others)}" if others else "")
    return ", ".join(owners)


def make_flags() -> str:
    """The page of flags."""
    upstream, parts = upstream_flags(), [FLAGS_HEAD]
    scripts = {name for names in upstream.values() for name in names}
    parser = build_parser()
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        parts += [f"## {group.title[0].upper()}{group.title[1:]}\n", "| flag | meaning | from |", "|---|---|---|"]
        for action in actions:
            owners = upstream.get(action.option_strings[0], [])
            source = _source(owners, scripts)
            text = (formatter._get_help_string(action) or "").replace("|", "\\|").replace("%%", "%")
            choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
            parts.append(f"| `{'`, `'.join(action.option_strings)}` | {text}{choices} | {source} |")
        parts.append("")
    return "\n".join(parts)


def make_reference() -> str:
    """The whole page.

    Raises:
        ValueError: if a public name has no place in the page's order.
    """
    public = {name for name in blockskip_hooks.__all__ if name != "__version__"}
    if public != set(_ORDER):
        raise ValueError(f"give {sorted(public ^ set(_ORDER))} a place in {Path(__file__).name}, or take it out.")
    source = Path(blockskip_hooks.__file__).parent
    rooms = "`, `".join(sorted(path.parent.name for path in source.glob("*/__init__.py")))
    return "\n".join([HEAD.format(rooms=rooms), *(f"{describe(name)}\n" for name in _ORDER)])


PAGES: dict[str, Callable[[], str]] = {"reference.md": make_reference, "flags.md": make_flags}
"""What makes each page, by its name."""


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or check them; the exit code is 1 if one is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if a page is stale.")
    args = parser.parse_args(argv)
    code = 0
    for name, make in PAGES.items():
        file, page = ROOT / "docs" / name, make()
        if not args.check:
            file.write_text(page)
            continue
        fresh = file.is_file() and file.read_text() == page
        print(f"{name} is {'fresh' if fresh else 'stale: run python tools/make_reference.py'}")
        code |= not fresh
    return code


if __name__ == "__main__":
    sys.exit(main())
