"""What a model answers once something of its positions is taken away: which layers use what they are given.

A knock-out changes one thing in a trained model and leaves the rest, with no training after it. How many answers change
says how much depends on that one thing. What is taken away is replaced by what is the same for all patches, so that
nothing but places is lost: of a term, each patch gets the mean over the patches (mean ablation); a bias, a turn of q
and k, or a convolution over the grid is left out.

Shapes: B batch, C classes, P prefix tokens, M = H*W patches, N = P + M tokens, D embedding width, L layers.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lape_vit import encodings
from lape_vit.analysis.passes import Pass, grid_of_images, logits_from, observe
from lape_vit.analysis.positions import Model, attentions
from lape_vit.analysis.probes import PlaceProbe, permute_contents, remove_position
from lape_vit.encodings import NoEncoding
from lape_vit.joins import Terms
from lape_vit.places import Places

INPUT, OUTPUT, ALL = "input", "output", "all"
PERMUTED_PLACES, PERMUTED_CONTENTS = "places permuted", "contents permuted"
SHIFTS = (1.0, 0.5)
"""Default shifts of an image, to the right and down, in patches."""

Spot = int | str
"""Where positions enter a model: ``INPUT``, the number of a block, or ``OUTPUT``."""


class KnockOut(NamedTuple):
    """One change, and what the model answers under it.

    Attributes:
        name: for the eye; unique among those of a model.
        answer: from images (B, C, height, width) and the intact pass over them to logits (B, C).
    """

    name: str
    answer: Callable[[Tensor, Pass], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What became of a model's answers.

    Attributes:
        accuracy: per cent; None where no labels are known.
        agreement: how often the answer is that of the intact model, per cent.
    """

    accuracy: float | None
    agreement: float


@torch.no_grad()
def knock_outs(
    model: Model,
    images: Iterable[tuple[Tensor, Tensor | None]],
    shifts: Sequence[float] = SHIFTS,
    seed: int = 0,
) -> dict[str, Outcome]:
    """All knock-outs of a model, by their names: those of :func:`layers_taken_away` and :func:`places_changed`, and
    contents permuted among the patches of each image. The intact model comes first, as ``intact``.

    Args:
        model: in evaluation mode.
        images: batches (B, C, height, width), normalised, each with its labels (B,) or None; read once.
        shifts: of an image to the right and down, in patches.
        seed: of the permutations.

    Raises:
        ValueError: there are no images.
    """
    changes = [*layers_taken_away(model).values(), *places_changed(model, shifts, seed)]
    generator = torch.Generator().manual_seed(seed)
    counts = {name: Answers() for name in ("intact", *(change.name for change in changes), PERMUTED_CONTENTS)}
    for batch, labels in images:
        seen = observe(model, batch)
        counts["intact"].add(seen.logits, seen.logits, labels)
        for change in changes:
            counts[change.name].add(change.answer(batch, seen), seen.logits, labels)
        permuted = permute_contents(batch, grid_of_images(model, batch), generator)
        counts[PERMUTED_CONTENTS].add(observe(model, permuted).logits, seen.logits, labels)
    return {name: answers.outcome() for name, answers in counts.items()}


@torch.no_grad()
def layers_taken_away(model: Model) -> dict[Spot, KnockOut]:
    """A knock-out for each spot where positions enter the model, in the order of the layers, and one of all together.

    Of a block that is what its join adds before its attention, what an encoding does in its attention, and an encoding
    of the tokens after it; ``INPUT`` is what is added to x_0, and ``OUTPUT`` what is added after the last norm. A
    classifier that reads the mean of the patches or a prefix token loses nothing with the last one.
    """
    found: dict[Spot, KnockOut] = {}
    for spot in spots_of_positions(model):
        name = f"block {spot}" if isinstance(spot, int) else spot
        found[spot] = KnockOut(name, partial(answer_without, model, {spot}))
    if found:
        found[ALL] = KnockOut(ALL, partial(answer_without, model, {*found}))
    return found


def spots_of_positions(model: Model) -> list[Spot]:
    """Where positions enter a model."""
    terms = model.position_terms()
    spots: list[Spot] = [] if terms.input is None else [INPUT]
    for layer, attn in enumerate(attentions(model)):
        after = model.token_encoding is not None and model.token_encoding.after == layer
        if attn.encoding is not None or after or any(term is not None for term in terms.of_block(layer)):
            spots.append(layer)
    return spots if terms.output is None else [*spots, OUTPUT]


@torch.no_grad()
def answer_without(model: Model, spots: Collection[Spot], images: Tensor, seen: Pass) -> Tensor:
    """The logits (B, C) once positions are taken away at some spots.

    Args:
        spots: of :func:`spots_of_positions`; a block that has no position loses nothing.
        images: (B, C, height, width).
        seen: the intact pass over them, from which the blocks before the first of the spots are taken over.
    """
    blocks = [spot for spot in spots if isinstance(spot, int)]
    terms = alike_at(seen.terms, spots, model.num_prefix_tokens)
    with without_encodings(model, blocks):
        if INPUT in spots:
            x, _ = model.tokens_of(images)
            x = x if terms.input is None else x + terms.input
            return logits_from(model, 0, model.norm_pre(x), terms, seen.places)
        first = min(blocks, default=len(seen.inputs) - 1)
        return logits_from(model, first, seen.inputs[first], terms, seen.places)


def alike_at(terms: Terms, spots: Collection[Spot], num_prefix_tokens: int) -> Terms:
    """The terms in which, at some spots, all patches have the mean over the patches."""

    def at(spot: Spot, term: Tensor | None) -> Tensor | None:
        if term is None or spot not in spots:
            return term
        prefix, patches = term[:, :num_prefix_tokens], term[:, num_prefix_tokens:]
        return torch.cat([prefix, patches.mean(dim=1, keepdim=True).expand_as(patches)], dim=1)

    residual, attention = ([at(*one) for one in enumerate(part)] for part in (terms.residual, terms.attention))
    return Terms(at(INPUT, terms.input), residual, attention, at(OUTPUT, terms.output))


@contextmanager
def without_encodings(model: Model, blocks: Collection[int]) -> Iterator[None]:
    """Within this context, no encoding acts in the attention of these blocks, and none on the tokens after them."""
    chosen = [attn for layer, attn in enumerate(attentions(model)) if layer in blocks]
    of_attention, of_tokens = [attn.encoding for attn in chosen], model.token_encoding
    try:
        for attn in chosen:
            attn.encoding = None
        if of_tokens is not None and of_tokens.after in blocks:
            model.token_encoding = None
        yield
    finally:
        for attn, encoding in zip(chosen, of_attention, strict=True):
            attn.encoding = encoding
        model.token_encoding = of_tokens


def places_changed(model: Model, shifts: Sequence[float] = SHIFTS, seed: int = 0) -> list[KnockOut]:
    """Knock-outs by places and by shifted images.

    - All patches get the places of others, in one order for all images.
    - All places are shifted by one cell to the right and down, and the image is not: what reads offsets alone does not
      notice. Rotary encodings notice it by prefix tokens, which they do not turn.
    - The image is shifted to the right and down, and what leaves it comes in on the other side; a shift of less than a
      pixel is left out.
    - The same with places that follow the content. A shift by whole patches then gives the same patches at the same
      places, of which no model notices anything unless its patches overlap, and is left out. So is any other where an
      encoding reads no places between cells.

    Args:
        shifts: in patches.
        seed: of the order.
    """
    changes = [
        KnockOut(PERMUTED_PLACES, partial(answer_elsewhere, model, partial(permuted, seed=seed))),
        KnockOut("places shifted by 1", partial(answer_elsewhere, model, lambda places: places.shifted(1, 1))),
    ]
    parts = encodings.resolve(model.pe).parts
    takes_parts = all(part.reads_real_places or part is NoEncoding for part in parts)
    height, width = model.patch_embed.patch_size
    for shift in shifts:
        right, down = round(shift * width), round(shift * height)
        if not right or not down:
            continue
        changes.append(KnockOut(f"image shifted by {shift:g}", partial(answer_shifted, model, right, down, False)))
        if takes_parts and (right % width or down % height):
            name = f"image and places shifted by {shift:g}"
            changes.append(KnockOut(name, partial(answer_shifted, model, right, down, True)))
    return changes


def permuted(places: Places, seed: int) -> Places:
    """The places in an order that depends on the seed and on their number."""
    height, width = places.grid
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
    return places.permuted(order.to(places.device))


def answer_elsewhere(model: Model, change: Callable[[Places], Places], images: Tensor, seen: Pass) -> Tensor:
    """The logits (B, C) with other places."""
    tokens, places = model.tokens_of(images)
    x, terms, places = model.embed(tokens, change(places))
    return logits_from(model, 0, x, terms, places)


def answer_shifted(model: Model, right: int, down: int, with_places: bool, images: Tensor, seen: Pass) -> Tensor:
    """The logits (B, C) of images shifted by some pixels round the edge.

    Args:
        with_places: whether each patch has the place from which its content came.
    """
    tokens, places = model.tokens_of(images.roll((down, right), dims=(-2, -1)))
    if with_places:
        height, width = model.patch_embed.patch_size
        places = places.shifted(-right / width, -down / height).wrapped()
    x, terms, places = model.embed(tokens, places)
    return logits_from(model, 0, x, terms, places)


def answer_without_position(model: Model, layer: int, probe: PlaceProbe, seen: Pass) -> Tensor:
    """The logits (B, C) once what tells places, by a probe, is removed from the patch tokens of a block's input.

    Args:
        layer: of the block; L stands for the tokens after the last norm.
    """
    depth, P = len(seen.inputs), model.num_prefix_tokens
    x = seen.output if layer == depth else seen.inputs[layer]
    x = torch.cat([x[:, :P], remove_position(x[:, P:], probe)], dim=1)
    return model.forward_head(x) if layer == depth else logits_from(model, layer, x, seen.terms, seen.places)


class Answers:
    """Counts of answers that are right, and of those that are the intact model's."""

    def __init__(self) -> None:
        self.images = self.labelled = self.right = self.same = 0

    def add(self, logits: Tensor, intact: Tensor, labels: Tensor | None) -> None:
        """Add logits (B, C), beside those of the intact model, and the labels (B,) where they are known."""
        answers = logits.argmax(dim=-1)
        self.images += len(answers)
        self.same += int((answers == intact.argmax(dim=-1)).sum())
        if labels is not None:
            self.labelled += len(answers)
            self.right += int((answers == labels.to(answers.device)).sum())

    def outcome(self) -> Outcome:
        """The result for all images added.

        Raises:
            ValueError: there are none.
        """
        if not self.images:
            raise ValueError("no images to judge the model on")
        accuracy = 100 * self.right / self.labelled if self.labelled else None
        return Outcome(accuracy, 100 * self.same / self.images)
