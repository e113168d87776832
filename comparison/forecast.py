"""What a comparison will take: the plan, with the time of one really measured step of each pair."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging import getLogger

import torch
from rich.console import Console

from comparison.plan import Plan, Run, count_cores
from comparison.tables import NAMES, heading
from engine import evaluate, train_one_epoch
from runtime.logs import Loop, LoopDisplay, clock
from runtime.tables import Row, print_table
from runtime.world import World
from training.models import count_parameters
from training.optimisation import images_per_update
from training.setup import set_up

_logger = getLogger(__name__)

WARM_UP = 2
"""Steps that are not measured."""
SECONDS = 4.0
"""Of measuring, at most and where the epoch is long enough: so long that the loader's first batches do not count."""


class EnoughError(Exception):
    """Ends a loop whose speed is known."""


class SampledLoop(Loop):
    """A loop that ends once it has been measured."""

    def advance(self, images: int, status: Callable[[], Sequence[str]]) -> None:
        super().advance(images, status)
        warm_up = min(WARM_UP, self.steps - 1)
        if self.step == warm_up:
            status()  # which waits for the device
            self.images, self.waited, self.start = 0, 0.0, time.perf_counter()
        elif self.step > warm_up and (self.step == self.steps or time.perf_counter() - self.start > SECONDS):
            status()
            raise EnoughError


class Stopwatch(LoopDisplay):
    """Shows nothing; measures the first part of a loop.

    Attributes:
        speed: images per second.
        waiting: part of the time spent waiting for data, 0..1.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.speed = self.waiting = 0.0

    @contextmanager
    def show(self, title: str, steps: int, first: int = 0) -> Iterator[Loop]:
        """See `LoopDisplay`."""
        loop = SampledLoop(steps, 1, lambda *drawn: None, False, first)
        try:
            yield loop
        finally:
            self.speed, self.waiting = loop.images_per_second(), loop.waiting_share()


@dataclass(frozen=True)
class Cost:
    """What a run of a pair takes, alone on its share of the machine.

    Attributes:
        speed: images per second, in training.
        waiting: part of the time in training spent waiting for data, 0..1.
        epoch: seconds of an epoch and its evaluation.
    """

    parameters: int
    speed: float
    waiting: float
    epoch: float


def measure(run: Run) -> Cost:
    """Train and evaluate a little, by the loops of `main.py`.

    Raises:
        ValueError, OSError, RuntimeError: the run cannot start.
    """
    watch = Stopwatch()
    setup = set_up([*run.argv, "--no-tensorboard"], World(), watch)
    training = setup.training
    assert training is not None  # without --eval it trains
    training.begin_epoch()
    with suppress(EnoughError):
        train_one_epoch(training, setup.runtime, "")
    speed, waiting = watch.speed, watch.waiting
    with suppress(EnoughError):
        evaluate(setup.model, setup.test_loader, setup.num_test_images, setup.runtime, "")
    images = training.updates * images_per_update(setup.options.data, setup.options.optimisation, world_size=1)
    return Cost(count_parameters(setup.model), speed, waiting, images / speed + setup.num_test_images / watch.speed)


def forecast(plan: Plan, jobs: int, console: Console) -> int:
    """Show the plan and the time that it takes.

    Returns:
        The exit code: 1 if a pair cannot start.
    """
    if jobs > 1:
        torch.set_num_threads(max(1, count_cores() // jobs))
    rows: list[Row] = []
    total, longest, code = 0.0, 0.0, 0
    for pair in dict.fromkeys(run.pair for run in plan.runs):
        runs = [run for run in plan.runs if run.pair == pair]
        left = [run.epochs - run.epochs_done() for run in runs if not run.is_finished()]
        row = dict(zip(NAMES, pair, strict=True)) | {"finished": f"{len(runs) - len(left)} of {len(runs)}"}
        row |= {"epochs left": f"{sum(left):,}"}
        _logger.info("measuring %s", ", ".join(pair))
        try:
            with warnings_only():
                cost = measure(runs[0])
        except (ValueError, OSError, RuntimeError) as error:
            _logger.error("%s cannot start: %s", ", ".join(pair), " ".join(str(error).split()))
            code = 1
        else:
            total += sum(left) * cost.epoch
            longest = max(longest, *(epochs * cost.epoch for epochs in left), 0.0)
            row |= {"parameters": f"{cost.parameters:,}", "images/s": f"{cost.speed:,.0f}"}
            row |= {"waiting for data": f"{100 * cost.waiting:.0f} %"}
            row |= {"an epoch": f"{cost.epoch:.1f} s", "a run": clock(cost.epoch * runs[0].epochs)}
        rows.append(row)
    print_table(console, heading(plan), rows, NAMES)
    each = f", if {jobs} at a time are each as fast as one alone on {plan.common['device']}" if jobs > 1 else ""
    _logger.info("about %s in all%s", clock(max(total / jobs, longest)), each)
    return code


@contextmanager
def warnings_only() -> Iterator[None]:
    """Within this context, no log record below WARNING."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level)
