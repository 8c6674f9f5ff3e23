#!/usr/bin/env python
"""Write ``docs/reference.md`` from the docstrings of the package's public names; ``--check`` says whether it is fresh.

Example:
    python tools/make_reference.py
"""

from __future__ import annotations

import argparse
import enum
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import blockskip_hooks


FILE = Path(__file__).parents[1] / "docs" / "reference.md"
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
    *("embedded_model", "embedded_photos", "embedded_subjects"),
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


def main(argv: list[str] | None = None) -> int:
    """Write the page, or check it; the exit code is 1 if it is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if the page is stale.")
    args = parser.parse_args(argv)
    page = make_reference()
    if args.check:
        fresh = FILE.is_file() and FILE.read_text() == page
        print(f"{FILE.name} is {'fresh' if fresh else 'stale: run python tools/make_reference.py'}")
        return 0 if fresh else 1
    FILE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
