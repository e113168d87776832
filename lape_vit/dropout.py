"""Dropout whose random numbers cost less on a CPU."""

import torch
from torch import Tensor, nn

LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """torch's dropout, with 16 random bits per element on a CPU in eager training, where torch draws one by one.

    The probability is then `p` rounded to a multiple of 2^-16, and the rest is scaled by that, so that the expectation
    is exact. The bits come from torch's generator, whatever the number of threads. Elsewhere it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * LEVELS)
        is_eager = isinstance(x, Tensor) and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        if not (is_eager and self.training and x.device.type == "cpu" and not self.inplace and 0 < dropped < LEVELS):
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)  # 64 bits each
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= dropped - LEVELS // 2
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def use_fast_dropout(model: nn.Module) -> None:
    """Let a model drop by this module where it drops by torch's."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, child.inplace).train(child.training))
