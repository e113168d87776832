"""Parabolic position encoding (PaPE, Ohrstrom et al., arXiv 2602.01418; DTU-PAS/parabolic-position-encoding).

In each head, with D = key minus query in patches, as (x, y), u_m the m-th direction of the head, and x_i what attention
reads of the query's token (after norm1):

    term_ij = sum over m of -a_m(x_i) (D . u_m)^2 + b_m(x_i) D . u_m,     a = softplus(W_a x_i),  b = W_b x_i

It stands inside the scaled product: logits are d^-1/2 (q_i . k_j + term_ij), d the width of a head without the columns
that the term adds to q and k. W_a, W_b and the directions are linear maps without bias, of each layer its own.

The published code (pape/nn/positions/pape_naive.py) has query minus key in the linear part; here it is key minus query,
so that its W_b is the negative of ours. It gives the class token the place (0, 0) and counts the patches' columns and
rows from 1, so that the class token takes part; here pairs with a prefix token have term 0.
"""

import math

import numpy as np

from tests.references.common import Array, Coordinates, Grid, places, with_prefix


def softplus(value: float) -> float:
    """ln(1 + exp(value))."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def bias(
    tokens: Array,
    directions: Array,
    weight_a: Array,
    weight_b: Array,
    grid: Grid,
    prefix: int = 0,
    x: Coordinates = None,
    y: Coordinates = None,
) -> Array:
    """d^-1/2 term_ij (B, h, N, N), to be added to the scaled logits.

    Args:
        tokens: what attention reads (B, N, D).
        directions: u (h, m, 2), column first.
        weight_a: (h, m, D), before the softplus.
        weight_b: (h, m, D).
    """
    where = places(grid, x, y)
    heads, parabolas, _ = directions.shape
    head_dim = tokens.shape[2] // heads
    table = np.zeros((len(tokens), heads, len(where), len(where)))
    for index, sequence in enumerate(tokens):
        for head in range(heads):
            for query, (x_query, y_query) in enumerate(where):
                token = sequence[prefix + query]
                a = [softplus(weight @ token) for weight in weight_a[head]]
                b = [weight @ token for weight in weight_b[head]]
                for key, (x_key, y_key) in enumerate(where):
                    total = 0.0
                    for m in range(parabolas):
                        along = (x_key - x_query) * directions[head, m, 0] + (y_key - y_query) * directions[head, m, 1]
                        total += -a[m] * along**2 + b[m] * along
                    table[index, head, query, key] = total / math.sqrt(head_dim)
    return with_prefix(table, prefix)
