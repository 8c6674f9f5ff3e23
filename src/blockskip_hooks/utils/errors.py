"""What an error says, in one line, and the class of errors that people read."""

from __future__ import annotations


_REASON_CHARACTERS = 300


class UserError(ValueError):
    """What a person asked for cannot be done.

    The message is one line for that person: what is wrong, with which value, and what to do. The scripts print it
    without a traceback.
    """


def one_line(text: str) -> str:
    """``text`` on one line; what would break or colour it, in the name of a file say, is shown as an escape."""
    words = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop; the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    reason = lines[0].strip().rstrip(".") if lines else type(error).__name__
    return reason if len(reason) <= _REASON_CHARACTERS else f"{reason[:_REASON_CHARACTERS]}..."
