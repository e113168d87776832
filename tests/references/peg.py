"""Position encoding generator (CPVT, Chu et al., arXiv 2102.10882; timm's PosConv).

After one block the patches become x + a 3 x 3 convolution of x over the grid, channel by channel, with zeros around the
grid. As everywhere in the field, weight[c, 0, 0, 0] meets the upper left neighbour. Prefix tokens pass by and are not
seen.
"""

from tests.references.common import Array, Grid


def generate(x: Array, weight: Array, bias: Array, grid: Grid, prefix: int = 0) -> Array:
    """Tokens (B, N, D) after it, of tokens x.

    Args:
        weight: (D, 1, 3, 3).
        bias: (D,).
    """
    height, width = grid
    out = x.copy()
    for index in range(x.shape[0]):
        for channel in range(x.shape[2]):
            for row in range(height):
                for column in range(width):
                    total = bias[channel]
                    for down in (-1, 0, 1):
                        for right in (-1, 0, 1):
                            if 0 <= row + down < height and 0 <= column + right < width:
                                neighbour = prefix + (row + down) * width + column + right
                                total += weight[channel, 0, down + 1, right + 1] * x[index, neighbour, channel]
                    out[index, prefix + row * width + column, channel] += total
    return out
