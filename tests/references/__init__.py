"""Position encodings and joins written a second time, as plain loops in float64, straight from the papers' equations.

They share no code with ``lape_vit`` and do not use torch, so that an error in one is not an error in the other. They
are slow and meant for small shapes; ``tests/test_references.py`` holds each against numbers of the published code.

Shapes and words, in every file:

- B batch, P prefix tokens, M patches, N = P + M tokens, D width, h heads, d = D / h, L layers.
- ``grid`` is (H, W), the rows and columns of patches. ``x`` and ``y`` are the patches' columns and rows in cells,
  counted from 0, as real numbers; None stands for every cell of the grid, row by row.
- Prefix tokens come first. A bias is (h, N, N) or (B, h, N, N), query by key. y points downwards.
- Arrays in and out are numpy's, in float64.
"""
