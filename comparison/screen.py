"""How far the jobs are: a table that is kept up to date on a terminal, lines elsewhere."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from comparison.jobs import FAILED, FINISHED, RUNNING, WAITING, Job
from runtime.logs import LINES_PER_LOOP, clock

_logger = getLogger(__name__)

ORDER = (RUNNING, FAILED, WAITING, FINISHED)
STYLES = {RUNNING: "cyan", FAILED: "red", WAITING: "dim", FINISHED: "green"}
LINES_AROUND = 5
"""Of the terminal's height, for what is above and below the jobs."""


@dataclass
class Count:
    """How many parts of a job are done."""

    job: Job
    done: int = 0

    def look(self) -> bool:
        """Count again; say whether there are more than before, but not all."""
        before, self.done = self.done, sum(part.is_done() for part in self.job.parts)
        return before < self.done < len(self.job.parts)

    def __str__(self) -> str:
        return f"{self.done}/{len(self.job.parts)}"


@dataclass
class RunLog:
    """What the log of a run in training says.

    Attributes:
        changed: when it did so last, of the file's and of this process's clock.
    """

    job: Job
    rows: list[dict[str, Any]] = field(default_factory=list)
    changed: tuple[int, float] = (0, 0.0)

    def look(self) -> bool:
        """Read the log again if it has changed; say whether an epoch has been added."""
        log = self.job.run.folder / "log.txt"
        stamp = log.stat().st_mtime_ns if log.exists() else 0
        if stamp == self.changed[0]:
            return False
        epochs, self.rows = len(self.rows), self.job.run.rows()
        self.changed = stamp, time.monotonic()
        return len(self.rows) > epochs

    @property
    def epochs_left(self) -> int:
        return self.job.run.epochs - (self.rows[-1]["epoch"] if self.rows else 0)

    def seconds_per_epoch(self) -> float:
        """On average; 0 before the first."""
        return sum(row["seconds"] for row in self.rows) / max(1, len(self.rows))

    def seconds_left(self) -> float:
        """For a running one that has finished an epoch."""
        return max(0.0, self.seconds_per_epoch() * self.epochs_left - (time.monotonic() - self.changed[1]))


class Screen:
    """Shows jobs within its context.

    Args:
        title: what the jobs do.
        places: how many of them run at a time.
    """

    def __init__(self, console: Console, title: str, jobs: Sequence[Job], places: int, trains: bool) -> None:
        self.console = console
        self.title = title
        self.jobs = jobs
        self.places = places
        self.trains = trains
        self.logs = {job.name: RunLog(job) for job in jobs}
        self.counts = {job.name: Count(job) for job in jobs}
        self.start = time.monotonic()
        self.states = {job.name: WAITING for job in jobs}
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal and jobs else None

    def __enter__(self) -> "Screen":
        for log in self.logs.values():
            log.look()
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.watch()
        if self.live is not None:
            self.live.stop()

    def watch(self) -> None:
        """Show what has changed."""
        for job in self.jobs:
            if job.state != self.states[job.name]:
                self.states[job.name] = job.state
                if self.live is None or job.state == FAILED:
                    self._log_state(job)
            if self.trains and job.state == RUNNING and self.logs[job.name].look() and self.live is None:
                self._log_epoch(self.logs[job.name])
            if not self.trains and self.counts[job.name].look() and self.live is None:
                _logger.info("%s: %s sizes%s", job.name, str(self.counts[job.name]), self._left())
        if self.live is not None:
            self.live.update(self.render(), refresh=True)

    def _log_state(self, job: Job) -> None:
        done = sum(state in (FINISHED, FAILED) for state in self.states.values())
        what = {RUNNING: "started", FINISHED: "finished", FAILED: f"failed: {job.reason}"}[job.state]
        left = "" if job.state == RUNNING else f"  ({done} of {len(self.jobs)}{self._left()})"
        _logger.info("%s: %s%s", job.name, what, left)

    def _log_epoch(self, log: RunLog) -> None:
        row, epochs = log.rows[-1], log.job.run.epochs
        if row["epoch"] % max(1, epochs // LINES_PER_LOOP) == 0:
            left = clock(log.seconds_left())
            accuracy = f"acc@1 {row['test_acc1']:.2f} %  best {best(log.rows):.2f} %"
            _logger.info("%s: epoch %d/%d  %s  %s left", log.job.name, row["epoch"], epochs, accuracy, left)

    def _left(self) -> str:
        """A guess of the time until the last job ends: what is left takes as long as what is done."""
        if not self.trains:
            parts = [(part.work, part.is_done()) for job in self.jobs if job.state != FAILED for part in job.parts]
            done = sum(work for work, is_done in parts if is_done)
            left = sum(work for work, is_done in parts if not is_done)
            return f", {clock((time.monotonic() - self.start) * left / done)} left" if done and left else ""
        logs = list(self.logs.values())
        seconds = [row["seconds"] for log in logs for row in log.rows]
        epochs = sum(log.epochs_left for log in logs if log.job.state in (WAITING, RUNNING))
        if not (seconds and epochs):
            return ""
        return f", {clock(sum(seconds) / len(seconds) * epochs / min(self.places, len(self.jobs)))} left"

    def render(self) -> Group:
        """All jobs, the running ones first; as many as the terminal is high."""
        counts = Counter(job.state for job in self.jobs)
        states = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(self.title, no_wrap=True, min_width=max(len(job.name) for job in self.jobs))
        for column in ("epoch", "best %", "last %") if self.trains else ("sizes",):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("")  # the only one to shrink
        ordered = sorted(self.jobs, key=lambda job: ORDER.index(job.state))
        room = max(1, self.console.height - LINES_AROUND)
        for job in ordered[:room]:
            *numbers, remark = self._progress(job)
            table.add_row(job.name, *numbers, Text(remark, no_wrap=True, overflow="ellipsis"), style=STYLES[job.state])
        hidden = [Text(f"... and {len(ordered) - room} more")] if len(ordered) > room else []
        return Group(table, *hidden, Text(f"{states}{self._left()}", style="bold"))

    def _progress(self, job: Job) -> list[str]:
        log = self.logs[job.name]
        if not self.trains:
            return [str(self.counts[job.name]), job.reason or job.state]
        rows = log.rows
        numbers = ["", ""] if not rows else [f"{best(rows):.2f}", f"{rows[-1]['test_acc1']:.2f}"]
        note = f"{clock(log.seconds_left())} left" if job.state == RUNNING and rows else job.reason or job.state
        return [f"{rows[-1]['epoch'] if rows else 0}/{job.run.epochs}", *numbers, note]


def best(rows: Sequence[dict[str, Any]]) -> float:
    """The best test accuracy, per cent."""
    return max(row["test_acc1"] for row in rows)
