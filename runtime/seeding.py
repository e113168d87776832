"""Random states, each a function of where the run is.

Nothing random is carried over from one batch to the next: an image's crop, its augmentation and its erasing are seeded
by its place in the epoch's order over all processes, and what is random in a step (mixup, dropout, stochastic depth) by
the step and the process. So a run that is resumed at any step draws what it would have drawn, with any number of loader
workers, and there is no random state to save.
"""

import random

import numpy as np
import torch

# The first number of a place says what is seeded; without a place: the weights.
CROP, STEP, AUGMENTATION, ERASING = 1, 2, 3, 4


def seed_everything(seed: int, *place: int) -> None:
    """Seed `random`, `numpy` and `torch` on all devices in use, so that what follows depends on these numbers alone."""
    state = int(np.random.SeedSequence((seed, *place)).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    # Not torch.manual_seed: it also prepares GPUs that are not in use, which takes longer than to load a small image.
    torch.default_generator.manual_seed(state)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(state)
