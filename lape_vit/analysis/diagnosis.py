"""Does a model know where its patches are, in which layer, and does it use it? All measures, in plain numbers.

Images are read once: the first half fits the probes, the second is held out and judges them; the knock-outs and the
statistics of attention are of the held-out images, too. What each measure means: `docs/diagnosis.md`.

Shapes: B batch, P prefix tokens, M = H*W patches, D embedding width, h heads, L layers.
"""

import time
from collections.abc import Iterable, Mapping
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
    PlaceSums,
    permute_contents,
    places_to_find,
    tokens_of_pass,
)

FLOOR_IMAGES = 256
"""Images of each half that an untrained model is probed with, at most."""
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
        accuracy: of the intact model on the held-out images, per cent; None where no labels are known.
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
    accuracy: float | None
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
) -> Diagnosis:
    """All measures of a model at the size of its images; :func:`at_size` gives those at other sizes.

    Args:
        model: in evaluation mode.
        images: batches to fit probes to; each is read once.
        held_out: batches of other images, on which everything is judged.
        untrained: a model of the same kind with random weights, as a floor for the probes; None to leave that out. It
            sees the first ``FLOOR_IMAGES`` images of both.
        ridge: penalty of the probes' squared weights, in mean variances of a channel; above 0.
        seed: of the permutations.

    Raises:
        ValueError: no images, fewer than two held out, images of one patch only, or tokens that are NaN or infinite.
    """
    start = time.perf_counter()
    spots = 2 * len(model.blocks) + 1
    probes = Probing(model, spots, ridge, seed)
    floor = None if untrained is None else Probing(untrained, spots, ridge, seed, FLOOR_IMAGES)
    for batch, _ in images:
        probes.fit(batch)
        if floor is not None:
            floor.fit(batch)

    away = layers_taken_away(model)
    changes = places_changed(model, seed=seed)
    by_spot: dict[Spot, Answers] = {spot: Answers() for spot in away}
    by_change = {change.name: Answers() for change in changes}
    intact, permuted = Answers(), Answers()
    removed = [Answers() for _ in range(len(model.blocks) + 1)]
    attention = [AttentionSums() for _ in model.blocks]
    size = grid = (0, 0)
    for batch, labels in held_out:
        size, grid = (batch.shape[-2], batch.shape[-1]), grid_of_images(model, batch)
        seen, seen_permuted = probes.judge(batch)
        if floor is not None:
            floor.judge(batch)
        intact.add(seen.logits, seen.logits, labels)
        permuted.add(seen_permuted.logits, seen.logits, labels)
        for spot, answers in by_spot.items():
            answers.add(away[spot].answer(batch, seen), seen.logits, labels)
        for change in changes:
            by_change[change.name].add(change.answer(batch, seen), seen.logits, labels)
        for layer, answers in enumerate(removed):
            logits = answer_without_position(model, layer, probes.permuted[2 * layer].probe, seen)
            answers.add(logits, seen.logits, labels)
        add_pass(attention, model, seen, grid)

    found, outcomes = probes.found(), {spot: answers.outcome() for spot, answers in by_spot.items()}
    knocked = {name: answers.outcome() for name, answers in by_change.items()}
    knocked[PERMUTED_CONTENTS] = permuted.outcome()
    if ALL in outcomes:
        knocked[ALL_TAKEN_AWAY] = outcomes[ALL]
    lost = [answers.outcome() for answers in removed]
    seen_attention = [of_layer.statistics() for of_layer in attention]
    layers = [
        Layer(
            found[2 * number],
            found[2 * number + 1],
            lost[number],
            outcomes.get(number),
            of_layer.entropy.tolist(),
            of_layer.distance.tolist(),
        )
        for number, of_layer in enumerate(seen_attention)
    ]
    return Diagnosis(
        pe=model.pe,
        join_type=model.join_type,
        grid=grid,
        size=size,
        tokens=model.num_prefix_tokens + grid[0] * grid[1],
        fitted=probes.images,
        held_out=intact.images,
        accuracy=intact.outcome().accuracy,
        layers=layers,
        output=found[-1],
        removed=lost[-1],
        input_taken_away=outcomes.get(INPUT),
        output_taken_away=outcomes.get(OUTPUT),
        knock_outs=knocked,
        untrained=[] if floor is None else floor.found(),
        sizes=[],
        seconds=time.perf_counter() - start,
        about={},
    )


class Probing:
    """Probes of all spots of a model, each with images as they are and with permuted contents.

    The spots are each block's input and what its attention reads, by turns, and the tokens after the last norm.

    Args:
        most: images that are looked at, in each half.
    """

    def __init__(self, model: Model, spots: int, ridge: float, seed: int, most: int | None = None) -> None:
        self.model, self.ridge, self.most = model, ridge, most
        self.generator = torch.Generator().manual_seed(seed)
        self.images = self.judged = 0
        self.sums = [[PlaceSums() for _ in range(spots)] for _ in range(2)]
        self.as_they_are: list[FoundSums] = []
        self.permuted: list[FoundSums] = []

    def fit(self, images: Tensor) -> None:
        """Add a batch to what the probes are fitted to."""
        images = images if self.most is None else images[: max(0, self.most - self.images)]
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
        images = images if self.most is None else images[: max(0, self.most - self.judged)]
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

    def _passes(self, images: Tensor) -> list[Pass]:
        permuted = permute_contents(images, grid_of_images(self.model, images), self.generator)
        return [observe(self.model, images), observe(self.model, permuted)]

    def _patches(self, seen: Pass) -> list[Tensor]:
        P = self.model.num_prefix_tokens
        return [*tokens_of_pass(seen, P), seen.output[:, P:]]


def known(found: Found) -> Known:
    """The numbers without the probe."""
    return Known(found.r2, found.error, found.similarity, found.share, found.removed_share)


@torch.no_grad()
def at_size(model: Model, images: Iterable[Batch], way: str) -> AtSize:
    """Accuracy and attention of a model on images of one size, for which it was set up by its `set_input_size`.

    Args:
        model: in evaluation mode.
        images: read once.
        way: a name of how it is evaluated.

    Raises:
        ValueError: there are no images.
    """
    attention, answers = [AttentionSums() for _ in model.blocks], Answers()
    size = grid = (0, 0)
    for batch, labels in images:
        size, grid = (batch.shape[-2], batch.shape[-1]), grid_of_images(model, batch)
        seen = observe(model, batch)
        answers.add(seen.logits, seen.logits, labels)
        add_pass(attention, model, seen, grid)
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
