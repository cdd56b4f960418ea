"""Signals: the first is a request, the second an interruption, but never of a save."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from maml_rl.signals import Terminated, exit_code, raise_on_terminate, stop_requests


def test_the_first_signal_is_noted_and_the_second_interrupts_unless_shielded() -> None:
    """Sent to this very process; the old handlers are back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as requests:
        assert requests.number == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.number == signal.SIGTERM
        with requests.shield():
            os.kill(os.getpid(), signal.SIGINT)
        assert requests.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_elsewhere_than_in_the_main_thread_handlers_are_left_alone() -> None:
    """Where Python would refuse to set them."""
    found = []

    def ask() -> None:
        with stop_requests() as requests:
            found.append((signal.getsignal(signal.SIGINT), requests.number))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGINT), 0)]


def test_exit_codes_tell_the_signals_apart() -> None:
    """130 after Ctrl-C, 143 after SIGTERM, which the command turns into an interruption."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        raise_on_terminate()
        with pytest.raises(Terminated) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        # A library's C++ makes this of it.
        assert exit_code(KeyboardInterrupt()) == 143
        raise_on_terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (exit_code(caught.value), exit_code(KeyboardInterrupt())) == (143, 130)
