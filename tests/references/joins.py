"""The joins PVG and MPVG (arXiv 2502.02919), from the paper's equations; no public code was found.

w is the encoding, x_l the residual stream that enters block l, LNpe_l one LayerNorm per step, l = 1 .. L:

    x_0 = tokens + w;  w_0 = w,  w_l = LNpe_l(w_(l-1))
    block 0 reads LN(x_0); block l >= 1 reads LN(x_l) + w_l
    output LN(x_L), and in MPVG + LNpe_L(w_0), before the mean over patches

So PVG has L - 1 norms, 1 .. L - 1, and MPVG L. The MLPs and the residual stream see no w but that of x_0. The models of
the paper have no class token.
"""

from typing import NamedTuple

from tests.references.common import Array
from tests.references.vit import layer_norm


class Terms(NamedTuple):
    """What a join adds: to x_0, to what attention of each block reads after its norm, and after the last norm."""

    input: Array
    attention: list[Array | None]
    output: Array | None


def pvg(w: Array, norms: list[tuple[Array, Array]], eps: float = 1e-6) -> Terms:
    """Terms (R, D) of w (R, D).

    Args:
        norms: weight and bias (D,) of LNpe_1 .. LNpe_(L-1).
    """
    attention: list[Array | None] = [None]
    state = w
    for weight, bias in norms:
        state = layer_norm(state, weight, bias, eps)
        attention.append(state)
    return Terms(w, attention, None)


def mpvg(w: Array, norms: list[tuple[Array, Array]], eps: float = 1e-6) -> Terms:
    """The same, with LNpe_L as the last of ``norms``."""
    weight, bias = norms[-1]
    return pvg(w, norms[:-1], eps)._replace(output=layer_norm(w, weight, bias, eps))
