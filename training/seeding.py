"""Random states, each a function of where the run is."""

import random

import numpy as np
import torch


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed `random`, `numpy` and `torch` on all devices, so that what follows depends on these three numbers alone.

    So the epochs are the same whether or not the run was stopped and resumed between them.
    """
    state = int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)
