"""A bias that a small MLP makes of the offset between two patches.

Shapes: h heads, m hidden units.
"""

import math
from typing import Literal

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from lape_vit.encodings.base import AttentionEncoding, LayerSpec


class ContinuousBias(AttentionEncoding):
    """16 sigmoid(W2 relu(W1 c + b1)), with c the logarithms of the offset, row first, query less key.

    Log-spaced continuous position bias (Swin V2, Liu et al. 2022, https://arxiv.org/abs/2111.09883, Eq. 3 and 4), one
    MLP per layer. c(a) = sign(a) log2(1 + 8 |a| / (n - 1)) / log2(8), where n is the side of the grid that the model
    was trained on: at another size an offset in cells keeps its meaning. The trained grid is stored in the state dict,
    so that it stays with the weights. In the form ``cr``, timm's for its Swin V2 variants, c(a) = sign(a) ln(1 + |a|)
    has no side in it, W2 has a bias, and there is no sigmoid. Pairs with a prefix token have no bias, as in timm's
    ``RelPosMlp``.

    Where the trained window is not given, the codes of Swin V2 and of timm divide by the window at hand; here it is
    always known. timm's module drops 1 in 8 hidden units in training; the paper and its code do not, nor does this one.
    Two rules are ours: n - 1 is at least 1, and the MLP reads offsets between cells as they are.

    Args:
        cpb_mode: ``swin`` or ``cr``.
        cpb_hidden: m; 512 in Swin V2.
    """

    name = "cpb"
    trained_grid: Tensor | None

    def __init__(self, spec: LayerSpec, *, cpb_mode: Literal["swin", "cr"] = "swin", cpb_hidden: int = 512) -> None:
        if cpb_hidden < 1:
            raise ValueError(f"cpb_hidden={cpb_hidden}: it must be at least 1")
        super().__init__(spec)
        self.is_swin = cpb_mode == "swin"
        self.mlp = Mlp(2, cpb_hidden, spec.num_heads, act_layer=nn.ReLU, bias=(True, not self.is_swin))
        self.register_buffer("trained_grid", torch.tensor(spec.grid) if self.is_swin else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02^2) weights and zero biases, as in Swin V2; the trained grid is the one at hand."""
        for layer in (self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.trained_grid is not None:
            self.trained_grid.copy_(torch.tensor(self.grid))

    def no_weight_decay(self) -> set[str]:
        """The whole MLP, as in Swin V2's code: it stands in for a table."""
        return {name for name, _ in self.named_parameters()}

    def log_offsets(self, dx: Tensor, dy: Tensor) -> Tensor:
        """c of offsets of any shape (...), query less key in cells: (..., 2), the row's first."""
        offsets = torch.stack([dy, dx], dim=-1)
        if self.trained_grid is None:
            return offsets.sign() * (1 + offsets.abs()).log()
        trained = (self.trained_grid - 1).clamp(min=1).to(offsets)
        return offsets.sign() * (1 + 8 * offsets.abs() / trained).log2() / math.log2(8)

    def bias_of(self, dx: Tensor, dy: Tensor) -> Tensor:
        """The bias of offsets of any shape (...), query less key in cells: (..., h)."""
        bias = self.mlp(self.log_offsets(dx, dy).to(self.mlp.fc1.weight.dtype))
        return 16 * bias.sigmoid() if self.is_swin else bias

    def offset_bias(self, dx: Tensor, dy: Tensor) -> Tensor:
        return self.bias_of(-dx, -dy).transpose(-1, -4).squeeze(-1)
