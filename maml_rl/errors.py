"""What can go wrong; each message is for the user, a sentence or two."""

from __future__ import annotations

import re

NOBODY_LEFT = 4
"""Exit code where a cluster has no worker, and none comes."""


class InputError(ValueError):
    """What the user gave is wrong; the message says how to mend it. Exit code 2."""


class CheckpointError(InputError):
    """A checkpoint is missing, not whole, or not to be trusted."""


class RunStopped(RuntimeError):  # noqa: N818  # it is news, not always a fault
    """A run ended before its last iteration; what was done is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the way from another process; an exception alone keeps its message only."""
        return type(self), (str(self), self.exit_code)


class RunWarning(UserWarning):
    """Something is not as it should be, and the run goes on; the message says with what."""


def printable(text: str) -> str:
    """Return text without control characters, which could make a terminal show anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return a message for a terminal: no control characters, and long values cut in the middle."""
    plain = re.sub(
        r"\w{61,}",
        lambda m: f"{m[0][:20]}...{m[0][-10:]} ({len(m[0])} characters)",
        printable(text),
    )
    return plain if len(plain) <= 1000 else f"{plain[:700]} ... {plain[-200:]}"


def refusal(text: str) -> InputError:
    """Return the error to raise for wrong input, whatever the input put into its message."""
    return InputError(one_line(text))
