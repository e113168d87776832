"""SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (SLURM's warning) and SIGALRM (a time limit), acted on between two updates.

An exception that a signal raises wherever the program happens to be can leave work half done, and can be lost: Python
ignores those of callbacks, such as the ones that run when a loader's worker is forked. So a signal is only kept here,
and a loop asks for it where all processes can stop together.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
SECONDS_UNTIL_IMPATIENT = 1.0  # torchrun and a terminal may both pass on the same Ctrl-C

_noted = 0
_noted_at = 0.0


class Interrupted(Exception):  # noqa: N818  (no error)
    """A signal asked the run to stop."""

    def __init__(self, signal_number: int, where: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}{where}")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1 (on Linux), 142 for SIGALRM, as shells count."""
        return 128 + self.signal_number


def end_on_ctrl_c(program: str) -> None:
    """Let Ctrl-C end this process in one line, until `raise_on_ctrl_c`.

    For the seconds in which a command imports its libraries, whose tracebacks fill screens.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), f"{program}: interrupted\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored on purpose, as by nohup
        signal.signal(signal.SIGINT, end)


def raise_on_ctrl_c() -> None:
    """Let Ctrl-C raise a `KeyboardInterrupt` again, after `end_on_ctrl_c`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Within this context signals are noted, for `noted_signal`; a second Ctrl-C, a second later, acts at once."""
    global _noted
    _noted = 0
    usual = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in usual.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):  # else it is ignored on purpose, as by nohup
            signal.signal(number, _keep_first)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Send this process SIGALRM after so many seconds, at once for 0 or less; None: never.

    To be used within `defer_interrupts`. It does not outlive the context.
    """
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _keep_first(number: int, frame: FrameType | None) -> None:
    global _noted, _noted_at
    if _noted and number == signal.SIGINT and time.monotonic() - _noted_at > SECONDS_UNTIL_IMPATIENT:
        raise KeyboardInterrupt
    if not _noted:
        _noted, _noted_at = number, time.monotonic()


@contextmanager
def hold_signals() -> Iterator[None]:
    """Within this context signals wait; processes that start here have them wait until `leave_signals_to_parent`.

    Else torch's own handler ends a loader's worker that gets a SIGTERM before it is ready, and with it the run.
    Python's resource tracker only ignores SIGINT and SIGTERM. It starts in here, so that no other signal ends it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks SIGINT and SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def noted_signal() -> int:
    """The number of the first signal since `defer_interrupts`; 0 for none."""
    return _noted


def leave_signals_to_parent(worker_id: int) -> None:
    """In a loader's worker: ignore the signals, which often reach every process of a job, unless the parent sends them.

    Else the parent could not load the batches that it needs to stop where all processes do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_parent_says, daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
