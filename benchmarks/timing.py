"""How the benchmarks measure: several things in turns, so that what else the machine does hits all of them."""

import ctypes
import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles

import torch


@dataclass(frozen=True)
class Timings:
    """Repeated measurements of one thing, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def ratio_to(self, other: "Timings") -> "Spread":
        """Of measurements that were made one after the other."""
        return Spread.of([ours / theirs for ours, theirs in zip(self.seconds, other.seconds, strict=True)])


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(low, middle, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} - {self.high:.3f})"


def alternate(calls: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[Timings]:
    """Measure calls in turns, each after one that does not count; every round has an order of its own."""
    for call in calls:
        call()
    synchronize(device)
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        for number in Random(turn).sample(range(len(calls)), len(calls)):
            start = time.perf_counter()
            calls[number]()
            synchronize(device)
            seconds[number].append(time.perf_counter() - start)
    return [Timings(values) for values in seconds]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MemoryMeter:
    """Peak memory of what a process does from now on, in bytes: allocated on a GPU, resident beside what was there
    before on a CPU (Linux only)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif self.can_measure(device):
            _return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")

    @staticmethod
    def can_measure(device: torch.device) -> bool:
        return device.type == "cuda" or platform.system() == "Linux"

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status("VmHWM") - self.before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def _return_freed_memory() -> None:
    """Let glibc give freed memory back at once, so that what is resident is what is used."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: blocks from 64 KiB on are mapped on their own
    libc.malloc_trim(0)


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Operations per second of a large matrix product, the most that is seen here."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    (sample,) = alternate([lambda: a @ b], repeats, device)
    return 2 * side**3 / min(sample.seconds)


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names: Iterator[str] = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
