"""Ctrl-C and SIGTERM, at whatever time they come."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came where no training was running."""


_TERMINATED = threading.Event()
"""Set by SIGTERM: in a library's C++ its exception becomes a plain KeyboardInterrupt."""


def raise_on_terminate() -> None:
    """Let SIGTERM interrupt like Ctrl-C, from here on."""
    _TERMINATED.clear()

    def interrupt(number: int, frame: FrameType | None) -> None:
        _TERMINATED.set()
        raise Terminated

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, interrupt)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return 143 after SIGTERM, 130 after Ctrl-C."""
    terminated = isinstance(interrupt, Terminated) or _TERMINATED.is_set()
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


class StopRequests:
    """Notes the first signal, and interrupts on the second."""

    def __init__(self) -> None:
        self.number = 0
        """The first signal that came, or 0."""
        self._shielded = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if not self.number:
            self.number = number
        elif not self._shielded:
            raise KeyboardInterrupt

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Let not even the second signal interrupt a block, such as one that saves."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turn the first Ctrl-C or SIGTERM into a request; elsewhere than in the main thread nothing.

    A second one raises KeyboardInterrupt, unless shielded.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    # What a script has switched off for its background jobs stays off.
    wanted = [
        s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN
    ]
    before = {s: signal.signal(s, requests.note) for s in wanted}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
