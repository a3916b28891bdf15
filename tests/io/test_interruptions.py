"""Interruptions wait for what must not be cut in two."""

from __future__ import annotations

import signal
import threading

import pytest

from acip_export.io import interruptions
from acip_export.io.interruptions import Interruption, interrupted_afterwards, noted_interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_noted_and_the_second_acts(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptions, "_ONE_REQUEST_SECONDS", 0.0)
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), noted_interruptions() as interrupted:
            assert not interrupted()
            signal.raise_signal(number)
            assert interrupted()
            signal.raise_signal(number)
            pytest.fail("it went on")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_block_is_done_before_it_is_interrupted() -> None:
    """Twice within milliseconds counts once."""
    done = False
    with pytest.raises(KeyboardInterrupt), interrupted_afterwards():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done


def test_behind_a_block_it_is_the_handlers_again() -> None:
    """One that notes it, of a larger block, goes on noting; one that knows of it takes the next for the same."""
    interruption = Interruption()
    before = signal.signal(signal.SIGINT, interruption)
    try:
        with noted_interruptions() as interrupted:
            with interrupted_afterwards():
                signal.raise_signal(signal.SIGINT)
            assert interrupted() == signal.SIGINT and not interruption.happened
        with pytest.raises(KeyboardInterrupt), interrupted_afterwards():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interruption.happened


def test_the_second_of_two_requests_interrupts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tidying up hangs, a later one ends it; one that follows at once is the same request."""
    interruption = Interruption()
    with pytest.raises(KeyboardInterrupt):
        interruption(signal.SIGINT, None)
    interruption(signal.SIGINT, None)
    assert interruption.happened
    monkeypatch.setattr(interruptions, "_ONE_REQUEST_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        interruption(signal.SIGINT, None)


def test_errors_are_not_hidden_by_an_interruption() -> None:
    with pytest.raises(OSError, match="full"), interrupted_afterwards():
        signal.raise_signal(signal.SIGINT)
        raise OSError("full")


def test_what_is_ignored_stays_ignored() -> None:
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with noted_interruptions() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_change_nothing() -> None:
    handlers = []

    def work() -> None:
        with noted_interruptions() as interrupted:
            handlers.append((signal.getsignal(signal.SIGINT), interrupted()))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(before, False)]
