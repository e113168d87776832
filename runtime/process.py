"""What one process computes on, in which type, and what it shows."""

from dataclasses import dataclass

import torch

from runtime.logs import LoopDisplay
from runtime.world import World


@dataclass(frozen=True)
class Runtime:
    """What the loops of this process run on.

    Attributes:
        amp_dtype: to compute in, with weights in float32.
    """

    world: World
    device: torch.device
    amp_dtype: torch.dtype
    display: LoopDisplay

    def autocast(self) -> torch.autocast:
        """A context that computes in `amp_dtype`."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)
