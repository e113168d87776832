"""Trainings and evaluations, several at a time, each a process with its output in a file."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Protocol

import torch

from comparison.plan import Run, count_cores
from runtime.interrupt import Interrupted, noted_signal

_logger = getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
MAIN, EVALUATION = ROOT / "main.py", ROOT / "comparison" / "evaluation.py"
SECONDS_BETWEEN_LOOKS = 0.2
WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"


class Part(Protocol):
    """Something that a job leaves behind.

    Attributes:
        work: what it takes, in a unit that all parts share.
    """

    @property
    def work(self) -> float: ...

    def is_done(self) -> bool: ...


@dataclass
class Job:
    """A process that trains a run, or that evaluates it.

    Attributes:
        argv: the arguments of `main.py`, or of `comparison/evaluation.py` where there are `parts`.
        folder: receives what it writes, and what it says, as `output.txt`.
        is_done: whether it has left behind what it is for.
        parts: the evaluations.
        reason: why it failed, in one line.
    """

    name: str
    run: Run
    argv: list[str]
    folder: Path
    is_done: Callable[[], bool]
    parts: Sequence[Part] = ()
    state: str = WAITING
    reason: str = ""
    offset: int = field(default=0, repr=False)  # in the file of its output, where this call's begins

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    def start(self, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start the process, whose output is appended to that of earlier ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = RUNNING
        with self.output.open("ab") as output:
            self.offset = output.tell()
            return subprocess.Popen(
                [sys.executable, str(EVALUATION if self.parts else MAIN), *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": python_path(), **environment},
                close_fds=False,  # of Python's files it inherits only the lock of `alone_in`
            )

    def end(self, exit_code: int) -> None:
        """Take note of how the process ended."""
        if exit_code == 0 and self.is_done():
            self.state = FINISHED
        else:
            self.state, self.reason = FAILED, self._reason(exit_code)

    def _reason(self, exit_code: int) -> str:
        with self.output.open("rb") as output:
            output.seek(self.offset)
            lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
        if exit_code < 0:
            return f"killed by {signal.Signals(-exit_code).name}"
        if said := [line for line in lines if line.startswith("main.py: ")]:
            return "; ".join(line.removeprefix("main.py: ").removeprefix("error: ") for line in said)
        last = f": {lines[-1].strip()}" if lines else ""
        return f"exit code {exit_code}{last}"


def python_path() -> str:
    """Where a process finds the modules of this project, and what the environment says besides."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run_jobs(
    jobs: Sequence[Job], places: Sequence[dict[str, str]], watch: Callable[[], object]
) -> Generator[Job, None, None]:
    """Run each job in one of the `places`, which are additions to the environment; yield it when it has ended.

    Args:
        watch: is called several times a second.

    Raises:
        Interrupted: a signal came; the processes have saved and ended. A second Ctrl-C does not wait for them.
    """
    waiting, free = deque(jobs), list(places)
    running: list[tuple[Job, subprocess.Popen[bytes], dict[str, str]]] = []
    try:
        while waiting or running:
            while waiting and free and not noted_signal():
                job, place = waiting.popleft(), free.pop(0)
                running.append((job, job.start(place), place))
            watch()
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if number := noted_signal():
                raise Interrupted(number)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                job, process, place = entry
                running.remove(entry)
                free.append(place)
                job.end(process.returncode)
                yield job
    finally:
        stop([process for _, process, _ in running])


def stop(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Ask processes to save and to end, and wait for that; if this is interrupted, end them as they are."""
    if processes:
        _logger.info("stopping %d processes, which save first; Ctrl-C again ends them as they are", len(processes))
    try:
        for process in processes:
            process.terminate()  # not by SIGINT, which a job that a shell started in the background ignores
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environments(jobs: int, device: str) -> list[dict[str, str]]:
    """Additions to the environment of so many jobs at a time: each has its share of the cores, and one of the GPUs."""
    environment = {}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, count_cores() // jobs))
    if device != "cuda":
        return [environment] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [{**environment, "CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(jobs)]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other calls of `compare.py` out of a folder, which is made if need be.

    The processes that are started meanwhile inherit the lock: it holds until the last of them has ended.

    Raises:
        ValueError: another call is at work there.
        OSError: the folder cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another compare.py is at work in {folder}, or runs that it has started") from error
        os.set_inheritable(lock.fileno(), True)
        yield


@contextmanager
def folder_of_batches(folder: Path) -> Iterator[Path]:
    """Where the runs in a folder share their batches; empty at the start, and gone at the end."""
    batches = folder / ".batches"
    if batches.exists():  # as an earlier call was killed
        shutil.rmtree(batches)
    try:
        yield batches
    finally:
        if batches.exists():
            shutil.rmtree(batches)
