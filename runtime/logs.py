"""What a run shows: log lines on rank 0, and the progress of a loop, as a bar on a terminal and as lines elsewhere."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_logger = logging.getLogger(__name__)

LINES_PER_LOOP = 10
SECONDS_BETWEEN_LINES = 5.0  # so that a short loop has none
SECONDS_BETWEEN_REFRESHES = 0.25
WIDE = 80
"""Columns for bar and text from which on a bar is long."""
GAP = "  "
"""What separates the fields of a line."""

Draw = Callable[[int, str, Sequence[str]], None]
"""Shows a loop at a step: with the time that is left, and other fields, the most important one first."""


def start_logging(is_main: bool) -> Console:
    """Send log records to standard output: from INFO on in the main process, from ERROR on in the others.

    Returns:
        The console that the records go to; a progress bar on it stays below them.
    """
    console = standard_console()
    handler = _ConsoleHandler(console)
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # at INFO it tells of its font cache
    return console


def standard_console(**options: Any) -> Console:
    """A console on standard output with rich's `options`: without escape sequences where that is no terminal.

    rich itself takes a pipe for a terminal under FORCE_COLOR or TTY_COMPATIBLE, which notebooks and CI set.
    """
    return Console(force_terminal=None if sys.stdout.isatty() else False, **options)


def end_in_one_line(program: str, message: str, exit_code: int) -> int:
    """Tell on standard error why the program ends, and return its exit code."""
    print(f"{program}:", " ".join(message.split()), file=sys.stderr, flush=True)
    return exit_code


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if self.console.is_terminal:
            text = "\n".join(break_between_fields(line, self.console.width) for line in text.splitlines())
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def break_between_fields(line: str, width: int) -> str:
    """A line of fields, two spaces or more apart, as lines of at most `width` columns where the fields allow it."""
    broken, *rest = re.split(r"(?<=\S)(\s{2,})", line)
    length = len(broken)
    for gap, field in zip(rest[::2], rest[1::2], strict=True):
        if length + len(gap) + len(field) > width:
            gap, length = f"\n{GAP}", 0
        broken += gap + field
        length += len(gap.removeprefix("\n")) + len(field)
    return broken


class Loop:
    """The progress of one loop over batches; made by `LoopDisplay.show`.

    Attributes:
        step: steps so far, those before this loop included.
        images: images of this loop, in this process.
        waited: seconds that this process has waited for the next batch.
    """

    def __init__(self, steps: int, num_ranks: int, draw: Draw, is_live: bool, first: int) -> None:
        self.steps = steps
        self.num_ranks = num_ranks
        self.draw = draw
        self.is_live = is_live
        self.step = self.first = first
        self.images = 0
        self.waited = 0.0
        self.start = self.drawn = time.perf_counter()

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """What `loader` yields; the time that it takes to do so counts as waiting for data, its start included."""
        start = time.perf_counter()
        for batch in loader:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def advance(self, images: int, status: Callable[[], Sequence[str]]) -> None:
        """Count a step of this process. `status`, which may wait for the device, is called only to be drawn.

        Args:
            status: fields such as `loss 1.25`, the most important one first.
        """
        self.step += 1
        self.images += images
        now = time.perf_counter()
        if self.is_live:
            is_due = now - self.drawn >= SECONDS_BETWEEN_REFRESHES or self.step == self.steps
        else:
            is_tenth = self.step % max(1, self.steps // LINES_PER_LOOP) == 0
            is_due = is_tenth and now - self.drawn >= SECONDS_BETWEEN_LINES
        if is_due:
            left = (now - self.start) / (self.step - self.first) * (self.steps - self.step)
            speed = [f"{self.images_per_second():.0f} images/s", f"{100 * self.waiting_share():.0f} % waiting for data"]
            self.draw(self.step, f"{clock(left)} left", [*status(), *speed])
            self.drawn = time.perf_counter()

    def images_per_second(self) -> float:
        """Of all processes, since the start."""
        return self.num_ranks * self.images / (time.perf_counter() - self.start)

    def waiting_share(self) -> float:
        """Of the time since the start, in this process; 0..1."""
        return self.waited / (time.perf_counter() - self.start)


class LoopDisplay:
    """Shows loops one after the other: as a bar where `console` is a terminal, as about ten log lines each elsewhere.

    Args:
        console: of this process; None for a process that shows nothing.
        num_ranks: how many processes share each loop, for the images per second of all.
    """

    def __init__(self, console: Console | None, num_ranks: int = 1) -> None:
        self.console = console
        self.num_ranks = num_ranks

    @contextmanager
    def show(self, title: str, steps: int, first: int = 0) -> Iterator[Loop]:
        """Within this context, `advance` the loop of so many steps, the `first` of which are done."""
        if self.console is None:
            yield Loop(steps, self.num_ranks, lambda *drawn: None, False, first)
        elif self.console.is_terminal:
            bar = _Bar(title, steps, first)
            with Live(bar, console=self.console, auto_refresh=False, transient=True) as live:

                def move(*drawn: Any) -> None:
                    bar.step, bar.left, bar.fields = drawn
                    live.refresh()

                yield Loop(steps, self.num_ranks, move, True, first)
        else:
            yield Loop(steps, self.num_ranks, partial(_log, title, steps), False, first)


class _Bar:
    """A line with a bar, the count and the time left, and before and after them what the terminal has room for."""

    def __init__(self, title: str, steps: int, step: int) -> None:
        self.title, self.steps, self.step = title, steps, step
        self.left = ""
        self.fields: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        count = f"{self.step:{len(str(self.steps))}}/{self.steps}"
        room = options.max_width - len(GAP.join(["", count, self.left]))
        bar = ProgressBar(total=self.steps, completed=self.step, width=min(20 if room >= WIDE else 10, room))
        room -= bar.width or 0
        cells: list[RenderableType] = [bar, Text(count), Text(self.left)]
        for number, text in enumerate([self.title, *self.fields]):
            room -= len(GAP + text)
            if room < 0:
                break
            cells.insert(len(cells) if number else 0, Text(text))
        grid = Table.grid(padding=(0, len(GAP), 0, 0))
        grid.add_row(*cells)
        yield grid


def _log(title: str, steps: int, step: int, left: str, fields: Sequence[str]) -> None:
    _logger.info("%s", GAP.join([title, f"{step:{len(str(steps))}}/{steps}", *fields, left]))


@contextmanager
def show_activity(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Within this context, show what is being done; what is yielded takes another text.

    A terminal shows it in a line with the seconds so far, which disappears at the end. Elsewhere the first text is
    logged at once, and later ones five seconds or more apart.
    """
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
            task = progress.add_task(text, total=None)
            yield lambda changed: progress.update(task, description=changed)
        return
    _logger.info("%s", text)
    logged = time.perf_counter()

    def log(changed: str) -> None:
        nonlocal logged
        if time.perf_counter() - logged >= SECONDS_BETWEEN_LINES:
            _logger.info("%s", changed)
            logged = time.perf_counter()

    yield log


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
