"""Which layer knows where its patches are: linear probes of the tokens for the column and row of each patch.

A probe is a ridge regression from a token to (x, y), fitted in closed form: images are read once, and only sums over
their tokens are kept, in float64. So results do not depend on the batch size beyond rounding, and nothing is drawn at
random but the permutations of contents, which depend on the seed and on the number of the image alone.

Shapes: B batch, M = H*W patches, D embedding width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lape_vit.analysis.passes import Pass, grid_of_images, observe
from lape_vit.analysis.positions import Model
from lape_vit.places import Places

RIDGE = 1e-6
"""Default penalty of the squared weights, in mean variances of a channel."""
CHANCE = 1e-3
"""Tokens tell places if tokens that know none would tell as much less often than this."""


@dataclass(frozen=True)
class PlaceProbe:
    """A linear map from tokens to places.

    Attributes:
        weight: (D, 2), float64.
        mean: of the tokens that the probe was fitted to, (D,).
        centre: the mean place, (2,): x and y in cells.
        along: what is to be removed of a token for each cell by which the probe finds it farther right, or down,
            (D, 2); 0 where places are told no better than by chance.
    """

    weight: Tensor
    mean: Tensor
    centre: Tensor
    along: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Places (x, y) in cells, (..., 2), of tokens (..., D)."""
        return (features.double() - self.mean) @ self.weight + self.centre

    def part(self, features: Tensor) -> Tensor:
        """What of tokens (..., D) tells their place, (..., D), float64; see :func:`remove_position`."""
        return (features.double() - self.mean) @ self.weight @ self.along.mT


@dataclass
class PlaceSums:
    """Sums over tokens and their places, from which a probe is fitted.

    Attributes:
        count: number of tokens.
        images: number of images that they are of.
        total: sum of the tokens and their places side by side, (D + 2,), float64.
        products: sum of the outer products of the same with itself, (D + 2, D + 2).
    """

    count: int = 0
    images: int = 0
    total: Tensor | None = None
    products: Tensor | None = None

    def add(self, features: Tensor, places: Tensor) -> None:
        """Add tokens (B, M, D) at (x, y) `places` (M, 2)."""
        places = places.to(features.device, torch.float64)
        rows = torch.cat([features.double(), places.expand(len(features), -1, -1)], dim=-1).flatten(0, 1)
        self.count += len(rows)
        self.images += len(features)
        self.total = rows.sum(dim=0) + (0 if self.total is None else self.total)
        self.products = rows.mT @ rows + (0 if self.products is None else self.products)

    def fit(self, ridge: float = RIDGE) -> PlaceProbe:
        """The probe W = (S + ridge * mean(diag S) I)^-1 C, of S = cov(tokens, tokens) and C = cov(tokens, places).

        Args:
            ridge: above 0.

        Raises:
            ValueError: there are no tokens, or tokens that are NaN or infinite.
        """
        if self.total is None or self.products is None:
            raise ValueError("no images to fit a probe to")
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            raise ValueError("the model's tokens are NaN or infinite: no probe can be fitted")
        tokens, cross = covariance[:-2, :-2], covariance[:-2, -2:]
        scale = tokens.diagonal().mean()
        penalty = ridge * scale if scale > 0 else torch.ones_like(scale)  # equal tokens have no covariance
        solved = torch.linalg.solve(tokens + penalty * torch.eye(len(tokens)).to(tokens), covariance[:-2])
        weight, freedom = solved[:, -2:], solved[:, :-2].trace()
        spread, axes = torch.linalg.eigh(covariance[-2:, -2:])
        varies = spread > 1e-9 * spread[-1]  # in a grid of one row, y does not
        unit = axes[:, varies] / spread[varies].sqrt()
        squares, directions = torch.linalg.eigh(unit.mT @ cross.mT @ weight @ unit)
        first = self._first_told(squares, freedom)
        kept = unit @ directions[:, first:]
        along = cross @ kept / squares[first:] @ kept.mT
        return PlaceProbe(weight, mean[:-2], mean[-2:], along)

    def _first_told(self, squares: Tensor, freedom: Tensor) -> int:
        """The first of the squared canonical correlations of tokens and places, ascending, that is more than chance.

        Bartlett's chi-square test, of fewer and fewer of the smallest of them. Places have the same mean in each image,
        so as many tokens as images are not counted.

        Args:
            squares: (2,), or (1,) for a grid of one row or column.
            freedom: effective number of the tokens' channels.
        """
        tokens = self.count - self.images - (freedom + len(squares) + 1) / 2
        statistics = -tokens * torch.log1p(-squares.clamp(max=1)).cumsum(0)
        for k in range(len(squares), 0, -1):
            degrees = k * (freedom - len(squares) + k)
            by_chance = torch.special.gammaincc(degrees / 2, statistics[k - 1] / 2)
            if not by_chance < CHANCE:  # NaN where tokens are equal, or too few
                return k
        return 0


@dataclass(frozen=True)
class Found:
    """What tokens tell of their places, on images that the probe was not fitted to.

    Attributes:
        probe: as fitted.
        r2: part of the variance of x and y together that it explains: 1 if it finds all places, about 0 if none; below
            0 where the mean place would be the better guess.
        error: mean distance from the true place, in patches.
        similarity: Spearman's rank correlation, over all pairs of different places, of the mean cosine similarity of
            the tokens there with their distance: -1 where nearer tokens are always more alike, 0 where distance does
            not matter (spatial similarity distance correlation, https://arxiv.org/abs/2606.00124).
        share: part of the tokens' variance that is between places: how much of a token is fixed by its place, whatever
            the image. Estimated without bias, so that chance gives 0 on the average (the adjusted R^2 of an analysis
            of variance by places).
        removed_share: variance of what :func:`remove_position` removes, as a part of the tokens' variance.
    """

    probe: PlaceProbe
    r2: float
    error: float
    similarity: float
    share: float
    removed_share: float


@dataclass
class FoundSums:
    """Sums over tokens and over the errors of a probe, from which :class:`Found` is made.

    Attributes:
        images: how many there were.
        places: (x, y) of each patch, (M, 2); None before the first images.
        sums: in float64: of the distances from the true place, the squares of these, and the squared distances of the
            true places from the mean place, (3,); of the cosine similarities of the tokens at each two places, (M, M);
            of the tokens at each place, less the probe's mean, (M, D); and of the squared lengths of these tokens, and
            of their parts that tell places, (2,).
    """

    probe: PlaceProbe
    images: int = 0
    places: Tensor | None = None
    sums: tuple[Tensor, ...] = ()

    def add(self, features: Tensor, places: Tensor) -> None:
        """Add tokens (B, M, D) at (x, y) `places` (M, 2), which are the same in every call."""
        self.places = places = places.to(features.device, torch.float64)
        deviation = features.double() - self.probe.mean
        found = deviation @ self.probe.weight
        squares = (found + self.probe.centre - places).square().sum(dim=-1)
        spread = len(features) * (places - self.probe.centre).square().sum()
        directions = F.normalize(features, dim=-1).transpose(0, 1).flatten(1)
        of_parts = (found @ (self.probe.along.mT @ self.probe.along) * found).sum()  # of found @ along.mT, shorter
        added = (
            torch.stack([squares.sqrt().sum(), squares.sum(), spread]),
            (directions @ directions.mT).double(),
            deviation.sum(dim=0),
            torch.stack([deviation.square().sum(), of_parts]),
        )
        self.images += len(features)
        self.sums = tuple(map(torch.add, self.sums, added)) if self.sums else added

    def found(self) -> Found:
        """The result for all tokens added.

        Raises:
            ValueError: there are fewer than two images.
        """
        if self.images < 2 or self.places is None:
            raise ValueError("no held-out images to judge the probes on: give two or more")
        errors, similarities, by_place, lengths = self.sums
        distances, squares, spread = errors.tolist()
        similarity = similarity_by_distance(similarities / self.images, self.places)
        error = distances / (self.images * len(self.places))
        return Found(self.probe, 1 - squares / spread, error, similarity, *self._shares(by_place, lengths))

    def _shares(self, by_place: Tensor, lengths: Tensor) -> tuple[float, float]:
        """The share of the variance between places, and that of what is removed."""
        count, total = self.images * len(by_place), by_place.sum(dim=0)
        of_all, of_part = lengths.tolist()
        variance = of_all - (total.square().sum() / count).item()
        if variance <= torch.finfo(torch.float64).eps * of_all:  # all tokens are equal
            return 0.0, 0.0
        within = of_all - (by_place.square().sum() / self.images).item()
        share = 1 - (within / (count - len(by_place))) / (variance / (count - 1))
        mean_part = self.probe.part(self.probe.mean + total / count)
        return share, (of_part - count * mean_part.square().sum().item()) / variance


def similarity_by_distance(similarities: Tensor, places: Tensor) -> float:
    """Spearman's rank correlation of similarities (M, M) with distances, over pairs of different places (M, 2).

    Similarities are rounded to six decimals, so that rounding alone makes no ranks; equal values share a rank.
    """
    first, second = torch.triu_indices(len(places), len(places), offset=1, device=places.device)
    distances = (places[first] - places[second]).norm(dim=-1)
    one, other = (
        ranks - ranks.mean() for ranks in map(ranked, (similarities[first, second].round(decimals=6), distances))
    )
    lengths = one.norm() * other.norm()
    return 0.0 if lengths == 0 else (one @ other / lengths).item()


def ranked(values: Tensor) -> Tensor:
    """The ranks of values (n,), from 1; equal values share the mean of theirs."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[places].double()


@dataclass(frozen=True)
class LayerPlaces:
    """What is known of places in one block.

    Attributes:
        input: in the tokens that it is given, before a term that its join adds to them.
        read: in what its attention reads, after norm1 and all terms.
    """

    input: Found
    read: Found


@torch.no_grad()
def probe_places(
    model: Model,
    images: Iterable[Tensor],
    held_out: Iterable[Tensor],
    permute: bool = False,
    ridge: float = RIDGE,
    seed: int = 0,
) -> list[LayerPlaces]:
    """Probe the patch tokens of all blocks for their places: one entry per block.

    Args:
        model: in evaluation mode.
        images: batches (B, C, height, width), normalised, to fit probes to; each is read once.
        held_out: more of them, on which the probes are judged.
        permute: permute the contents of each image among its patches, so that a probe cannot guess the place from what
            is usually there ("sky is up").
        ridge: penalty of the squared weights, in mean variances of a channel; above 0.
        seed: of the permutations.

    Raises:
        ValueError: no images, images of one patch only, or tokens that are NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed) if permute else None
    sums = [PlaceSums() for _ in range(2 * len(model.blocks))]
    for tokens, places in _tokens_and_places(model, images, generator):
        for of_spot, features in zip(sums, tokens, strict=True):
            of_spot.add(features, places)
    judged = [FoundSums(of_spot.fit(ridge)) for of_spot in sums]
    for tokens, places in _tokens_and_places(model, held_out, generator):
        for at_spot, features in zip(judged, tokens, strict=True):
            at_spot.add(features, places)
    found = [at_spot.found() for at_spot in judged]
    return [LayerPlaces(*pair) for pair in zip(found[::2], found[1::2], strict=True)]


def _tokens_and_places(
    model: Model, batches: Iterable[Tensor], generator: torch.Generator | None
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """For each batch its `patch_tokens` and the places (M, 2) of the patches."""
    for images in batches:
        places = places_to_find(model, images)
        grid = grid_of_images(model, images)
        yield patch_tokens(model, images if generator is None else permute_contents(images, grid, generator)), places


def places_to_find(model: Model, images: Tensor) -> Tensor:
    """(x, y) of each patch of images (B, C, height, width), in cells: (M, 2).

    Raises:
        ValueError: there is but one patch.
    """
    grid = grid_of_images(model, images)
    if grid[0] * grid[1] < 2:
        raise ValueError("images of one patch have no places to find: give larger images")
    return torch.stack(Places(grid).coordinates(), dim=-1)


def patch_tokens(model: Model, images: Tensor) -> list[Tensor]:
    """The patch tokens (B, M, D) that enter block 0, its attention, block 1, its attention, and so on."""
    return tokens_of_pass(observe(model, images), model.num_prefix_tokens)


def tokens_of_pass(seen: Pass, num_prefix_tokens: int) -> list[Tensor]:
    """The patch tokens of a pass, likewise."""
    spots = [tokens for pair in zip(seen.inputs, seen.reads, strict=True) for tokens in pair]
    return [tokens[:, num_prefix_tokens:] for tokens in spots]


def permute_contents(images: Tensor, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Images (B, C, height, width) whose H x W parts change places, in each image in an order of its own.

    Args:
        grid: (H, W) parts, which divide the height and the width.
        generator: of the CPU; draws one order for each image, one after the other.
    """
    rows, columns = grid
    parts = images.unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))  # (B, C, H, part's height, W, part's width)
    parts = parts.movedim((2, 4), (1, 2)).flatten(1, 2)  # (B, M, C, part's height, part's width)
    orders = [torch.randperm(rows * columns, generator=generator) for _ in range(len(images))]
    parts = torch.stack([image[order] for image, order in zip(parts, orders, strict=True)])
    return parts.unflatten(1, grid).movedim((1, 2), (2, 4)).flatten(-2).flatten(-3, -2)


def remove_position(features: Tensor, probe: PlaceProbe) -> Tensor:
    """Tokens (..., D) without what tells their place: x - C (W' C)^+ W' (x - mean), with the probe's W.

    C is the covariance of the tokens with places. What is left has no covariance with places, so that no linear probe
    does better on it than the mean place, where it is fitted to the same tokens; and of all maps of which that is true,
    this one changes tokens least (LEACE, Belrose et al. 2023, https://arxiv.org/abs/2306.03819, section 4, up to the
    ridge). A direction of places that tokens tell no better than by chance (:data:`CHANCE`) is left alone: what tells
    it in a sample is contents.
    """
    return (features.double() - probe.part(features)).to(features.dtype)
