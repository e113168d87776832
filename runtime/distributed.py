"""One process, or several that torchrun started: who is who, on which device, and sums over all of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from logging import getLogger

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.world import World

_logger = getLogger(__name__)


UNSHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""What has to be 1 in the environment for torchrun's restarts: else the processes that it starts anew find in its store
where those before them were, and look for each other there (https://github.com/pytorch/pytorch/issues/135712)."""


def check_size(wanted: int | None, world: World) -> None:
    """Refuse another number of processes than `--world-size` asks for.

    Raises:
        ValueError: says how to start that many.
    """
    if wanted not in (None, world.size):
        raise ValueError(
            f"--world-size {wanted}, but there are {world.size} process(es): start {wanted} by torchrun "
            f"--nproc_per_node=N, or set RANK, WORLD_SIZE and LOCAL_RANK for each"
        )


def pick_device(name: str | None, world: World) -> torch.device:
    """The device of this process; by default a GPU where there is one.

    Raises:
        ValueError: an unknown or absent device, or one GPU for several processes.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown --device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"--device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.index is not None and world.size > 1:
        raise ValueError(f"--device {name} is one GPU for {world.size} processes: give cuda, and each takes its own")
    index = world.local_rank if device.index is None else device.index
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"--device {name} needs GPU {index}, but torch sees {count}: give cpu, or start fewer processes"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """Let torch use deterministic algorithms only; to be called before a GPU is used.

    Where an operation has none, torch raises a RuntimeError that names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def start(world: World, device: torch.device, url: str = "env://", seconds: float = 1800.0) -> None:
    """Join the process group, if there are several processes: nccl between GPUs, gloo between CPUs.

    Args:
        url: where they meet, as `torch.distributed.init_process_group` takes it.
        seconds: how long to wait for the others, here and in each later exchange.

    Raises:
        ConnectionError: an address that nobody can meet at, or the others did not come.
    """
    if world.size == 1:
        if url != "env://":
            _logger.warning("--dist-url %s is without effect: this is the only process", url)
        return
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get(UNSHARED_STORE) != "1":
        _logger.warning("torchrun's --max-restarts fails without %s=1 in the environment", UNSHARED_STORE)
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=url,
            world_size=world.size,
            rank=world.rank,
            timeout=timedelta(seconds=seconds),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"process {world.rank} of {world.size} did not meet the others at --dist-url {url} within --init-timeout "
            f"{seconds:g} s: {error}"
        ) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another process of the group is not there any more."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error)  # gloo raises no type of its own


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model that averages gradients over the processes; the model itself, if there is only one."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextmanager
def in_turns() -> Iterator[bool]:
    """Let rank 0 in first, then one process of each other machine, then all others; tell each whether it may download.

    So a download is made once per disk, whether or not the machines share one, and nobody reads half a download. A
    process that fails still lets the others in. Without a process group this process is alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield True
        return
    rank = dist.get_rank()
    is_first_of_machine = int(os.environ.get("LOCAL_RANK", rank)) == 0
    turn = 0 if rank == 0 else 1 if is_first_of_machine else 2
    for _ in range(turn):
        dist.barrier()
    try:
        yield turn < 2
    finally:
        for _ in range(turn, 2):
            dist.barrier()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of each process's `tensor`, in place and on every process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_over_ranks(tensor: Tensor) -> Callable[[], list[int]]:
    """Start to find the largest of all processes' whole numbers (N,), in place; what is returned waits for them.

    So a GPU gets more work before the process waits, and only for what was queued before this call.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    on_host = tensor.to("cpu", non_blocking=True)
    if tensor.device.type != "cuda":
        return on_host.tolist
    event = torch.cuda.Event()
    event.record()

    def wait() -> list[int]:
        event.synchronize()
        return on_host.tolist()

    return wait


def gather_over_ranks(numbers: list[float], world: World, device: torch.device) -> list[list[float]]:
    """Every process's `numbers`, by rank, on every process."""
    table = torch.zeros(world.size, len(numbers), dtype=torch.float64, device=device)
    table[world.rank] = torch.tensor(numbers, dtype=torch.float64)
    return sum_over_ranks(table).tolist()
