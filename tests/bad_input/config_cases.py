"""Bad files of settings: what makes the file, and the words beside its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def words(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content, encoding="utf-8")


CONFIG_CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no file": (lambda path: None, ["cannot be read", "No such file"]),
    "a folder": (lambda path: path.mkdir(), ["cannot be read", "directory"]),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), ["not UTF-8"]),
    "Latin-1": (lambda path: path.write_bytes("instance_prompt: Hündchen".encode("latin-1")), ["not UTF-8"]),
    "zeros": (lambda path: path.write_bytes(bytes(8)), ["no YAML"]),
    "an empty file": (words(""), ["holds no settings"]),
    "a list": (words("- rank: 4"), ["holds no settings"]),
    "a word": (words("rank"), ["holds no settings"]),
    "an open bracket": (words("rank: 4\nmemory_options: ["), ["no YAML in line"]),
    "a colon too many": (words("rank: 4\nseed: 1: 2"), ["no YAML in line 2"]),
    "two documents": (words("rank: 4\n---\nrank: 8"), ["no YAML in line 2"]),
    "a Python object": (words("rank: !!python/object/apply:os.mkdir [unpickled]"), ["no YAML in line 1"]),
    "brackets without end": (words("[" * 5000), ["nested too deeply"]),
    "an unknown key": (words("ranks: 4"), ["ranks is no setting", "did you mean rank?"]),
    "an unknown word": (words("zzzzzz: 4"), ["zzzzzz is no setting", "flags without the dashes"]),
    "a key with dashes": (words("--rank: 4"), ["--rank is no setting", "did you mean rank?"]),
    "a number as a key": (words("4: rank"), ["4 is no setting"]),
    "a file in a file": (words("config: other.yaml"), ["config is no setting"]),
    "a dump in a file": (words("dump_config: true"), ["dump_config is no setting"]),
    "a config of accelerate": (
        words("distributed_type: MULTI_GPU\nnum_processes: 2"),
        ["accelerate", "--config_file"],
    ),
    "a number in words": (words("rank: four"), ["--rank", "int", "'four'"]),
    "half a number": (words("rank: 1.5"), ["--rank", "int", "'1.5'"]),
    "a switch as a number": (words("rank: true"), ["rank is True", "a number"]),
    "a rate in words": (words("learning_rate: fast"), ["--learning_rate", "float", "'fast'"]),
    "a rate as a list": (words("learning_rate: [1]"), ["learning_rate is [1]", "numbers"]),
    "a switch in words": (words("center_crop: 'yes'"), ["center_crop is 'yes'", "true or false"]),
    "a switch in one": (words("center_crop: 1"), ["center_crop is 1", "true or false"]),
    "a choice that is none": (words("residuals: later"), ["--residuals", "'later'", "precomputed", "online", "none"]),
    "a truth as a text": (words("skip_blocks: off"), ["skip_blocks is False", "a text in quotes"]),
    "a date as a text": (words("output_dir: 2026-01-01"), ["output_dir is", "quote a text"]),
    "a mapping as a text": (words("instance_prompt: {a: dog}"), ["instance_prompt is {'a': 'dog'}", "quote a text"]),
    "a flag that went": (words("select_on: base"), ["select_on is gone", "blockskip select"]),
}
