"""What can go wrong; each message is for the user, a sentence or two."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave is wrong; the message says how to mend it. Exit code 2."""


class CheckpointError(InputError):
    """A checkpoint is missing, not whole, or not to be trusted."""


class RunStopped(RuntimeError):  # noqa: N818  # it is news, not always a fault
    """A run ended before its last iteration; what was done is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunWarning(UserWarning):
    """Something is not as it should be, and the run goes on; the message says with what."""
