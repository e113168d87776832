"""Augmentation of places: in training, patches are told other places than theirs, the same in all layers."""

import math

import torch

from lape_vit.places import Places


class PlaceAugmentation:
    """One draw per forward, of shift, jitter and rescale (DINOv3, https://arxiv.org/abs/2508.10104).

    In coordinates from -1 to 1 over the grid, u becomes (u + s) j r, with a shift s of each axis, uniform in
    [-shift, shift]; a jitter j of each axis, log-uniform in [1 / jitter, jitter]; and one r for both axes, log-uniform
    in [1 / rescale, rescale]. All images of a batch share the draw.

    Args:
        shift: at least 0, in halves of the grid's sides; 0 for none.
        jitter: at least 1; 1 for none.
        rescale: at least 1; 1 for none.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, shift: float = 0.0, jitter: float = 1.0, rescale: float = 1.0) -> None:
        for name, value, least in (("pos_shift", shift, 0), ("pos_jitter", jitter, 1), ("pos_rescale", rescale, 1)):
            if not least <= value < math.inf:
                raise ValueError(f"{name}={value}: it must be a number of at least {least}")
        self.shift, self.jitter, self.rescale = shift, jitter, rescale

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return (self.shift, self.jitter, self.rescale) != (0, 1, 1)

    def __call__(self, places: Places) -> Places:
        """The places as one draw of torch's generator moves them."""
        if not self.is_on:
            return places
        draw = 2 * torch.rand(5, dtype=torch.float64, device=places.device) - 1
        height, width = places.grid
        shifted = places.shifted(self.shift * draw[0] * width / 2, self.shift * draw[1] * height / 2)
        by_x, by_y, by = (draw[2:] * draw.new_tensor([self.jitter, self.jitter, self.rescale]).log()).exp()
        return shifted.scaled(by_x * by, by_y * by)
