"""Ctrl-C, acted on between two batches.

An exception that a signal raises wherever the program happens to be can leave work half done, and can be lost: Python
ignores those of callbacks, such as the ones that run when a loader's worker is forked.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

_is_noted = Event()


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Within this context the first Ctrl-C is noted, for `raise_if_interrupted`; a second one acts at once."""
    usual = signal.getsignal(signal.SIGINT)
    _is_noted.clear()
    if usual is signal.default_int_handler:  # else it is ignored on purpose, as by nohup
        signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _note(signal_number: int, frame: FrameType | None) -> None:
    _is_noted.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_if_interrupted() -> None:
    """Where it is safe to stop.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if _is_noted.is_set():
        raise KeyboardInterrupt
