"""What every script starts and ends with: quiet libraries, a parser, errors in one line and exit codes."""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

from ..utils.errors import one_line
from .flag_names import with_flags


SETTINGS_ERROR = 2
"""Exit code for settings that cannot work."""
WORK_ERROR = 1
"""Exit code for work that cannot go on."""
CALLED_AS: ContextVar[str | None] = ContextVar("called_as", default=None)
"""What a person typed for a script, ``"blockskip plan"`` say; ``None`` for the script's own name."""
# What these say while they are imported is about optional packages, and kernels that no script here needs.
_TALKATIVE = ("torchao", "bitsandbytes", "diffusers.quantizers", "torch.utils._pytree")

# All the names that torch has had for its allocator's settings.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def quiet_libraries() -> None:
    """Let libraries say nothing of optional packages that they miss; call it before they are imported."""
    # transformers misses torchvision, whose image processors are not used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def keep_memory_whole() -> None:
    """Let CUDA's allocator grow its segments instead of leaving gaps; call it before torch is imported.

    By default it splits segments of fixed sizes, and what a stage left free is often in pieces too small for the next.
    Whoever sets the allocator decides. Windows and macOS have no such segments.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose errors are one line; with some ninety flags the usage text would hide the reason.

    Attributes:
        source: Where the words come from, if not from the command line: stands before what is wrong with them.
    """

    source = ""

    def error(self, message: str) -> NoReturn:
        message = with_flags(message)
        match = re.match("argument (--[a-zA-Z0-9_]+)(?:/--[a-zA-Z0-9_-]+)?: (.*)", message, re.DOTALL)
        if match is not None:
            flag, problem = match.groups()
            joint = " " if problem.startswith("is ") else ": "
            message = problem if problem.startswith(flag) else f"{flag}{joint}{problem}"
        if message.startswith("unrecognized arguments: "):
            message += self._meant(message.split()[2].split("=")[0])
        hint = "" if message.endswith(".") else " (--help lists every flag)"
        self.exit(SETTINGS_ERROR, f"error: {self.source}{one_line(message)}{hint}\n")

    def _meant(self, word: str) -> str:
        """What a word that is no flag may have been meant as."""
        if not word.startswith("-"):
            # Without quotes a shell makes words of a text, and the flag takes the first one.
            return "; a text of several words needs quotes, a value its flag before it, and a switch takes no value"
        close = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else ""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help texts with the default of each flag that has one; texts that speak of it themselves stay as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = ",".join(action.default) if isinstance(action.default, tuple) else action.default
        says_it = action.nargs == 0 or default in (None, "", [], argparse.SUPPRESS)
        if action.help is None or says_it or "default" in action.help.lower():
            return action.help
        # argparse fills in values behind percent signs.
        return f"{action.help.removesuffix('.')}; default: {str(default).replace('%', '%%')}."


def make_parser(description: str | None) -> OneLineParser:
    """A parser whose ``--help`` begins with a script's docstring, and that takes no shortened flags."""
    # A docstring marks names as reST does; a terminal has no use for two of each.
    text = description and description.replace("``", "`")
    if text and (typed := CALLED_AS.get()):
        text = re.sub(r"\bpython \w+\.py", typed, text)
    # The flags follow, each with its meaning: a list of their names alone would fill screens before them.
    usage = "%(prog)s [flags]"
    return OneLineParser(
        prog=CALLED_AS.get(), usage=usage, description=text, formatter_class=HelpFormatter, allow_abbrev=False
    )


class Failed(Exception):
    """Ends a script whose error has been printed.

    Attributes:
        code: The exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextmanager
def errors_in_one_line(code: int, stage: str | None = None, secret: str | None = None) -> Iterator[None]:
    """Within this context an error that a person can mend is one line and ends the script; bugs keep their traceback.

    Args:
        code: The exit code then.
        stage: The stage of the work, for errors that name it.
        secret: Text that must not be shown, such as a token.

    Raises:
        Failed: after the line.
    """
    from .errors import explain  # loads torch, which --help can do without

    try:
        yield
    except Exception as error:
        if (line := explain(error, stage, secret)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise Failed(code) from error


def returns_exit_code(main: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Let a script's ``main`` return its exit code: 0, of :func:`errors_in_one_line`, or of SIGINT, after a line."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except Failed as failure:
            return failure.code
        except KeyboardInterrupt as stop:
            print(f"Stopped by SIGINT. {stop}".rstrip(), file=sys.stderr)
            return 128 + signal.SIGINT
        return 0

    return wrapper
