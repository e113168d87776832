"""Which process this is, among those that torchrun started."""

import os
from dataclasses import dataclass

_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_environment() -> World:
    """What torchrun says in the environment; without it, the only process."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    return World(rank, size, local_rank)
