"""Image relative position encoding (iRPE, Wu et al., arXiv 2107.14222: product method, contextual mode,
shared by the heads; microsoft/Cream, iRPE).

An offset is put into one of seven classes by the piecewise function g, alpha : beta : gamma = 1.9 : 3.8 : 15.2:

    g(a) = round(a)                                                                       for |a| <= alpha
    g(a) = sign(a) min(beta, round(alpha + ln(|a| / alpha) / ln(gamma / alpha) (beta - alpha)))   elsewhere,

and cut to an integer, -3 .. 3: offsets from 4 on share a class. (From 11 on the code rounds to 4, clips to 3.8 and cuts
that to 3.) The bucket of query i and key j is 7 (g(dy) + 3) + g(dx) + 3 with (dy, dx) = query minus key; all pairs with
a prefix token, either way round, share bucket 49.

On keys a logit gains d^-1/2 q_i . r^K[bucket(i, j)]; on queries d^-1/2 k_j . r^Q[bucket(j, i)], the bucket of the pair
turned round; on values, attention also gathers sum_j a_ij r^V[bucket(i, j)].
"""

import math

import numpy as np
from numpy.typing import NDArray

from tests.references.common import Array, Coordinates, Grid, places, softmax

ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
SIDE = 2 * int(BETA) + 1
NUM_BUCKETS = SIDE**2 + 1


def piecewise(offset: float) -> int:
    """g of an offset in cells, whole or not."""
    if abs(offset) <= ALPHA:
        return round(offset)
    size = round(ALPHA + math.log(abs(offset) / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA))
    return int(math.copysign(min(size, BETA), offset))


def buckets(grid: Grid, prefix: int = 0, x: Coordinates = None, y: Coordinates = None) -> NDArray[np.int64]:
    """(N, N), query by key."""
    where = places(grid, x, y)
    table = np.full((prefix + len(where), prefix + len(where)), NUM_BUCKETS - 1)
    for query, (x_query, y_query) in enumerate(where):
        for key, (x_key, y_key) in enumerate(where):
            row, column = piecewise(y_query - y_key) + int(BETA), piecewise(x_query - x_key) + int(BETA)
            table[prefix + query, prefix + key] = SIDE * row + column
    return table


def key_term(q: Array, table_k: Array, bucket: NDArray[np.int64]) -> Array:
    """(B, h, N, N), to be added to the scaled logits.

    Args:
        q: (B, h, N, d), not scaled.
        table_k: (50, d), one vector per bucket.
        bucket: (N, N), from ``buckets``.
    """
    batch, heads, tokens, width = q.shape
    term = np.zeros((batch, heads, tokens, tokens))
    for index in range(batch):
        for head in range(heads):
            for i in range(tokens):
                for j in range(tokens):
                    term[index, head, i, j] = q[index, head, i] @ table_k[bucket[i, j]] / math.sqrt(width)
    return term


def query_term(k: Array, table_q: Array, bucket: NDArray[np.int64]) -> Array:
    """(B, h, N, N), to be added to the scaled logits; ``table_q`` is (50, d)."""
    return np.swapaxes(key_term(k, table_q, bucket), -1, -2)


def value_term(attention: Array, table_v: Array, bucket: NDArray[np.int64]) -> Array:
    """(B, h, N, d), to be added to what attention gathers.

    Args:
        attention: (B, h, N, N), after the softmax.
        table_v: (50, d).
    """
    batch, heads, tokens, _ = attention.shape
    gathered = np.zeros((batch, heads, tokens, table_v.shape[1]))
    for index in range(batch):
        for head in range(heads):
            for i in range(tokens):
                for j in range(tokens):
                    gathered[index, head, i] += attention[index, head, i, j] * table_v[bucket[i, j]]
    return gathered


def attention(
    q: Array,
    k: Array,
    v: Array,
    grid: Grid,
    prefix: int = 0,
    table_k: Array | None = None,
    table_q: Array | None = None,
    table_v: Array | None = None,
    x: Coordinates = None,
    y: Coordinates = None,
) -> Array:
    """What attention gathers, (B, h, N, d), with the encoding on the sides that have a table."""
    bucket = buckets(grid, prefix, x, y)
    logits = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    if table_k is not None:
        logits = logits + key_term(q, table_k, bucket)
    if table_q is not None:
        logits = logits + query_term(k, table_q, bucket)
    weights = np.apply_along_axis(softmax, -1, logits)
    gathered = weights @ v
    return gathered if table_v is None else gathered + value_term(weights, table_v, bucket)
