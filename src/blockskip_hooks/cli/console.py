"""The ``blockskip`` command: the example scripts under short names, and ``doctor``.

What runs is the script's own file, the one that people read; a wheel brings it along below ``share/``.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ..utils.errors import UserError
from ..version import __version__
from .startup import CALLED_AS, SETTINGS_ERROR, quiet_libraries


SCRIPTS = {
    "train": ("train_dreambooth_blockskip.py", "personalise a model from a folder of photos"),
    "plan": ("plan_memory.py", "what a run would need, without the model's files"),
    "select": ("select_blocks.py", "measure which blocks a model can best do without"),
    "evaluate": ("evaluate.py", "measure a trained LoRA against photos and prompts"),
}
COMMANDS = {name: meaning for name, (_, meaning) in SCRIPTS.items()} | {
    "doctor": "what this machine has, what was tested, what fits"
}


def shipped(name: str) -> Path:
    """A file or folder of the repository that installations have, too.

    Args:
        name: Its place below the repository's root, ``"configs/flux.yaml"`` say.

    Raises:
        UserError: if it is not there.
    """
    # A clone, also where it is installed in editable mode.
    if (here := Path(__file__).parents[3] / name).is_file():
        return here
    for file in metadata.files("blockskip-hooks") or ():
        if file.as_posix().endswith(f"share/blockskip_hooks/{name}"):
            return Path(str(file.locate())).resolve()
    raise UserError(f"{name} is not part of this installation; install the package again, or clone the repository.")


def help_text() -> str:
    """What the command can do."""
    lines = [f"  blockskip {name:<10} {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            f"blockskip {__version__}: DreamBooth-LoRA of large diffusion transformers on small GPUs.",
            "",
            *lines,
            "",
            "Each takes --help. Several GPUs: accelerate launch, see docs/files.md.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands; the exit code is the script's."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        print(f"error: '{name}' is none of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        return SETTINGS_ERROR
    quiet_libraries()
    before = CALLED_AS.set(f"blockskip {name}")
    try:
        return _command(name, words)
    finally:
        CALLED_AS.reset(before)


def _command(name: str, words: Sequence[str]) -> int:
    if name == "doctor":
        from . import doctor  # loads torch

        return doctor.main(words)
    script = str(shipped(f"examples/dreambooth_blockskip/{SCRIPTS[name][0]}"))
    if name == "train" and (code := _launched(script, words)) is not None:
        return code
    return _run(script, words)


def _launched(script: str, words: Sequence[str]) -> int | None:
    """Train as ``accelerate launch`` does where ``accelerate config`` said how; ``None`` where it did not."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    if not Path(default_config_file).is_file():
        return None
    launch_command(launch_command_parser().parse_args(["--quiet", script, *words]))
    return 0


def _run(script: str, words: Sequence[str]) -> int:
    """Run a script in this process, as ``python script words`` would."""
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
