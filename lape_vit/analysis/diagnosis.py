"""Does a model know where its patches are, in which layer, and does it use it? All measures, in plain numbers.

Images are read once: the first half fits the probes, the second is held out and judges them. Knock-outs, which cost
several passes of the model, and the statistics of attention are of the first of the held-out images. What each measure
means: `docs/diagnosis.md`.

Shapes: B batch, P prefix tokens, M = H*W patches, D embedding width, h heads, L layers.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lape_vit.analysis.attention_statistics import AttentionSums, add_pass
from lape_vit.analysis.knock_outs import (
    ALL,
    INPUT,
    OUTPUT,
    PERMUTED_CONTENTS,
    Answers,
    Outcome,
    Spot,
    answer_without_position,
    layers_taken_away,
    places_changed,
)
from lape_vit.analysis.passes import Pass, grid_of_images, observe
from lape_vit.analysis.positions import Model
from lape_vit.analysis.probes import (
    RIDGE,
    Found,
    FoundSums,
    PlaceProbe,
    PlaceSums,
    permute_contents,
    places_to_find,
    tokens_of_pass,
)
from lape_vit.places import Grid

FLOOR_PATCHES = 12_000
"""An untrained model is probed with as many images of each half as have so many patches together: 62 of 14 x 14."""
JUDGED_PATCHES = 20_000
"""Knock-outs and attention are by default of as many images as have so many patches together: 103 of 14 x 14."""
ALL_TAKEN_AWAY = "all positions taken away"

Batch = tuple[Tensor, Tensor | None]
"""Images (B, C, height, width), normalised, and their labels (B,); None where they are not those of the model."""


@dataclass(frozen=True)
class Known:
    """What is known of places at one spot of a model; see :class:`lape_vit.analysis.probes.Found`."""

    r2: float
    error: float
    similarity: float
    share: float
    removed_share: float


@dataclass(frozen=True)
class Tokens:
    """What is known of places in the same tokens.

    Attributes:
        as_they_are: of images as they are.
        permuted: of images whose contents were permuted among the places, so that only positions tell a place.
    """

    as_they_are: Known
    permuted: Known


@dataclass(frozen=True)
class Layer:
    """What is known of places in one block, and what it does with it.

    Attributes:
        input: in the tokens that the block is given.
        read: in what its attention reads.
        removed: once what tells places, by the probe for permuted contents, was removed from the patch tokens that the
            block is given.
        taken_away: once the block's own positions were taken away; None where it has none.
        entropy: of attention, nats, by head.
        distance: of attention, patches, by head.
    """

    input: Tokens
    read: Tokens
    removed: Outcome
    taken_away: Outcome | None
    entropy: list[float]
    distance: list[float]


@dataclass(frozen=True)
class AtSize:
    """The model at one size of its input.

    Attributes:
        size: (height, width) in pixels.
        way: how it was evaluated, such as ``plain``.
        grid: (H, W) patches.
        tokens: P + M, of which attention could give each the same weight: an entropy of log of this.
        accuracy: per cent; None where no labels are known.
        entropy: of attention, nats, by layer and head.
        distance: of attention, patches, by layer and head.
    """

    size: tuple[int, int]
    way: str
    grid: tuple[int, int]
    tokens: int
    accuracy: float | None
    entropy: list[list[float]]
    distance: list[list[float]]


@dataclass(frozen=True)
class Diagnosis:
    """All measures of one model.

    Attributes:
        pe, join_type: of the model.
        grid: (H, W) patches.
        size: (height, width) in pixels.
        tokens: P + M.
        fitted, held_out: how many images the probes were fitted to, and how many judged them.
        judged: how many of the held-out images knock-outs and statistics of attention are of.
        floor: how many images of each half an untrained model was probed with, at most.
        accuracy: of the intact model on the held-out images, per cent; None where no labels are known.
        intact: the same on the images of the knock-outs.
        layers: of each block.
        output: in the tokens after the last norm, which users of dense features read.
        removed: once what tells places, by the probe for permuted contents, was removed from these patch tokens.
        input_taken_away, output_taken_away: once what is added to x_0, or after the last norm, was taken away; None
            where there is no such thing.
        knock_outs: of the whole model, by name.
        untrained: what is known of places in a model of the same kind with random weights: in each block's input and in
            what its attention reads, by turns, and after the last norm. Empty where that was not measured. It is the
            floor of the probes: what needs no training.
        sizes: at other sizes of the input.
        seconds: that it took.
        about: what else is known, such as the checkpoint, the data set and the seed of the training.
    """

    pe: str
    join_type: str
    grid: tuple[int, int]
    size: tuple[int, int]
    tokens: int
    fitted: int
    held_out: int
    judged: int
    floor: int
    accuracy: float | None
    intact: float | None
    layers: list[Layer]
    output: Tokens
    removed: Outcome
    input_taken_away: Outcome | None
    output_taken_away: Outcome | None
    knock_outs: dict[str, Outcome]
    untrained: list[Tokens]
    sizes: list[AtSize]
    seconds: float
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists and numbers, for a JSON file."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Diagnosis":
        """The record of :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is of something else.
        """
        return _read(cls, values)


def _read(kind: Any, value: Any) -> Any:
    """A value of plain data in the type that an annotation says."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hint, value[name]) for name, hint in hints.items()})  # type: ignore[operator]
    if origin in (list, tuple):
        return origin(_read(inner[0], one) for one in value)
    if origin is dict:
        return {name: _read(inner[1], one) for name, one in value.items()}
    if type(None) in inner:
        return None if value is None else _read(inner[0], value)
    return value


@torch.no_grad()
def diagnose(
    model: Model,
    images: Iterable[Batch],
    held_out: Iterable[Batch],
    untrained: Model | None = None,
    ridge: float = RIDGE,
    seed: int = 0,
    judged: int | None = None,
) -> Diagnosis:
    """All measures of a model at the size of its images; :func:`at_size` gives those at other sizes.

    Args:
        model: in evaluation mode.
        images: batches to fit probes to; each is read once.
        held_out: batches of other images, on which everything is judged; in an order that means nothing.
        untrained: a model of the same kind with random weights, as a floor for the probes; None to leave that out. It
            sees the first images of both, which have ``FLOOR_PATCHES`` patches.
        ridge: penalty of the probes' squared weights, in mean variances of a channel; above 0.
        seed: of the permutations.
        judged: how many of the held-out images knock-outs and statistics of attention are of, at most; None for the
            first that have ``JUDGED_PATCHES`` patches.

    Raises:
        ValueError: no images, fewer than two held out, images of one patch only, or tokens that are NaN or infinite.
    """
    start = time.perf_counter()
    spots = 2 * len(model.blocks) + 1
    probes = Probing(model, spots, ridge, seed)
    floor = None if untrained is None else Probing(untrained, spots, ridge, seed, FLOOR_PATCHES)
    for batch, _ in images:
        probes.fit(batch)
        if floor is not None:
            floor.fit(batch)

    whole, using, grid, size = Answers(), Using(model, judged, seed), (0, 0), (0, 0)
    for batch, labels in held_out:
        size, grid = (batch.shape[-2], batch.shape[-1]), grid_of_images(model, batch)
        seen, seen_permuted = probes.judge(batch)
        if floor is not None:
            floor.judge(batch)
        whole.add(seen.logits, seen.logits, labels)
        using.add(batch, labels, seen, seen_permuted, [at_spot.probe for at_spot in probes.permuted[::2]])

    found = probes.found()
    return Diagnosis(
        pe=model.pe,
        join_type=model.join_type,
        grid=grid,
        size=size,
        tokens=model.num_prefix_tokens + grid[0] * grid[1],
        fitted=probes.images,
        held_out=whole.images,
        judged=using.intact.images,
        floor=0 if floor is None else max(floor.images, floor.judged),
        accuracy=whole.outcome().accuracy,
        intact=using.intact.outcome().accuracy,
        layers=using.layers(found),
        output=found[-1],
        removed=using.removed[-1].outcome(),
        input_taken_away=using.taken_away(INPUT),
        output_taken_away=using.taken_away(OUTPUT),
        knock_outs=using.knock_outs(),
        untrained=[] if floor is None else floor.found(),
        sizes=[],
        seconds=time.perf_counter() - start,
        about={},
    )


class Probing:
    """Probes of all spots of a model, each with images as they are and with permuted contents.

    The spots are each block's input and what its attention reads, by turns, and the tokens after the last norm.

    Args:
        patches: of each half, the first images that have so many patches are looked at; None for all.
    """

    def __init__(self, model: Model, spots: int, ridge: float, seed: int, patches: int | None = None) -> None:
        self.model, self.ridge, self.most_patches = model, ridge, patches
        self.generator = torch.Generator().manual_seed(seed)
        self.images = self.judged = 0
        self.sums = [[PlaceSums() for _ in range(spots)] for _ in range(2)]
        self.as_they_are: list[FoundSums] = []
        self.permuted: list[FoundSums] = []

    def fit(self, images: Tensor) -> None:
        """Add a batch to what the probes are fitted to."""
        images = self._wanted(images, self.images)
        if not len(images):
            return
        places = places_to_find(self.model, images)
        for sums, seen in zip(self.sums, self._passes(images), strict=True):
            for of_spot, features in zip(sums, self._patches(seen), strict=True):
                of_spot.add(features, places)
        self.images += len(images)

    def judge(self, images: Tensor) -> list[Pass]:
        """Add a batch to what the probes are judged on; they are fitted before the first.

        Returns:
            The passes over the images as they are and with permuted contents; none where there are images enough.
        """
        if not self.as_they_are:
            self.as_they_are, self.permuted = ([FoundSums(one.fit(self.ridge)) for one in sums] for sums in self.sums)
        images = self._wanted(images, self.judged)
        if not len(images):
            return []
        places, passes = places_to_find(self.model, images), self._passes(images)
        for judged, seen in zip((self.as_they_are, self.permuted), passes, strict=True):
            for at_spot, features in zip(judged, self._patches(seen), strict=True):
                at_spot.add(features, places)
        self.judged += len(images)
        return passes

    def found(self) -> list[Tokens]:
        """The result, by spot."""
        if not self.as_they_are:
            raise ValueError("no held-out images to judge the probes on: give two or more")
        pairs = zip(self.as_they_are, self.permuted, strict=True)
        return [Tokens(known(one.found()), known(other.found())) for one, other in pairs]

    def _wanted(self, images: Tensor, before: int) -> Tensor:
        """Those that are still to be looked at, after some before them."""
        if self.most_patches is None:
            return images
        most = images_with(self.most_patches, grid_of_images(self.model, images))
        return images[: max(0, most - before)]

    def _passes(self, images: Tensor) -> list[Pass]:
        permuted = permute_contents(images, grid_of_images(self.model, images), self.generator)
        return [observe(self.model, images), observe(self.model, permuted)]

    def _patches(self, seen: Pass) -> list[Tensor]:
        P = self.model.num_prefix_tokens
        return [*tokens_of_pass(seen, P), seen.output[:, P:]]


class Using:
    """What a model uses of places: knock-outs, and where its attention looks; of the first images alone.

    Args:
        most: images that are looked at; None for those that have ``JUDGED_PATCHES`` patches.
        seed: of the permutation of places.

    Attributes:
        intact: answers of the model as it is.
        removed: once the position was removed from the input of each block, and from the tokens after the last norm.
    """

    def __init__(self, model: Model, most: int | None, seed: int) -> None:
        self.model, self.most = model, most
        self.away, self.changes = layers_taken_away(model), places_changed(model, seed=seed)
        if len(self.away) == 2:  # one spot, which is all of them
            del self.away[ALL]
        self.by_spot: dict[Spot, Answers] = {spot: Answers() for spot in self.away}
        self.by_change = {change.name: Answers() for change in self.changes}
        self.intact, self.permuted = Answers(), Answers()
        self.removed = [Answers() for _ in range(len(model.blocks) + 1)]
        self.attention = [AttentionSums() for _ in model.blocks]

    def add(
        self, images: Tensor, labels: Tensor | None, seen: Pass, seen_permuted: Pass, probes: Sequence[PlaceProbe]
    ) -> None:
        """Add a batch, up to the number of images that are looked at.

        Args:
            seen, seen_permuted: the passes over the images, and over the same with permuted contents.
            probes: for permuted contents, of each block's input and of the tokens after the last norm.
        """
        grid = grid_of_images(self.model, images)
        most = images_with(JUDGED_PATCHES, grid) if self.most is None else self.most
        count = min(len(images), most - self.intact.images)
        if count <= 0:
            return
        images, labels, seen = images[:count], None if labels is None else labels[:count], seen.first(count)
        self.intact.add(seen.logits, seen.logits, labels)
        self.permuted.add(seen_permuted.logits[:count], seen.logits, labels)
        for spot, answers in self.by_spot.items():
            answers.add(self.away[spot].answer(images, seen), seen.logits, labels)
        for change in self.changes:
            self.by_change[change.name].add(change.answer(images, seen), seen.logits, labels)
        for layer, (probe, answers) in enumerate(zip(probes, self.removed, strict=True)):
            answers.add(answer_without_position(self.model, layer, probe, seen), seen.logits, labels)
        add_pass(self.attention, self.model, seen, grid)

    def layers(self, found: Sequence[Tokens]) -> list[Layer]:
        """The result of each block, with what was found in its tokens, by spot."""
        layers = []
        for number, sums in enumerate(self.attention):
            of_layer, removed = sums.statistics(), self.removed[number].outcome()
            heads = of_layer.entropy.tolist(), of_layer.distance.tolist()
            layers.append(Layer(found[2 * number], found[2 * number + 1], removed, self.taken_away(number), *heads))
        return layers

    def taken_away(self, spot: Spot) -> Outcome | None:
        """The result once the positions of a spot were taken away; None where there are none."""
        return self.by_spot[spot].outcome() if spot in self.by_spot else None

    def knock_outs(self) -> dict[str, Outcome]:
        """The results of the changes of the whole model."""
        found = {name: answers.outcome() for name, answers in self.by_change.items()}
        found[PERMUTED_CONTENTS] = self.permuted.outcome()
        if self.by_spot:
            found[ALL_TAKEN_AWAY] = [*self.by_spot.values()][-1].outcome()  # ALL is the last, or there is but one spot
        return found


def images_with(patches: int, grid: Grid) -> int:
    """How many images have so many patches together, or a few more; each has (H, W)."""
    return math.ceil(patches / (grid[0] * grid[1]))


def known(found: Found) -> Known:
    """The numbers without the probe."""
    return Known(found.r2, found.error, found.similarity, found.share, found.removed_share)


@torch.no_grad()
def at_size(model: Model, images: Iterable[Batch], way: str, judged: int | None = None) -> AtSize:
    """Accuracy and attention of a model on images of one size, for which it was set up by its `set_input_size`.

    Args:
        model: in evaluation mode.
        images: read once.
        way: a name of how it is evaluated.
        judged: the first images that attention is looked at on; None for all.

    Raises:
        ValueError: there are no images.
    """
    attention, answers = [AttentionSums() for _ in model.blocks], Answers()
    size = grid = (0, 0)
    for batch, labels in images:
        size, grid = (batch.shape[-2], batch.shape[-1]), grid_of_images(model, batch)
        seen = observe(model, batch)
        left = len(batch) if judged is None else judged - answers.images
        answers.add(seen.logits, seen.logits, labels)
        if left > 0:
            add_pass(attention, model, seen.first(left), grid)
    found = [of_layer.statistics() for of_layer in attention]
    return AtSize(
        size=size,
        way=way,
        grid=grid,
        tokens=model.num_prefix_tokens + grid[0] * grid[1],
        accuracy=answers.outcome().accuracy,
        entropy=[of_layer.entropy.tolist() for of_layer in found],
        distance=[of_layer.distance.tolist() for of_layer in found],
    )
