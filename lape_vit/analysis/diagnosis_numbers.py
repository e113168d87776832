"""The numbers of diagnoses, each under a key, and over the seeds of one training."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from lape_vit.analysis.diagnosis import ALL_TAKEN_AWAY, Diagnosis, Known, Tokens
from lape_vit.analysis.knock_outs import Outcome

INPUT, READ, OUTPUT = "input", "read", "output"
"""Spots of tokens: what a block is given, what its attention reads, and what comes after the last norm."""
REMOVED, TAKEN_AWAY = "position removed from the input", "own positions taken away"
REMOVED_AT_OUTPUT = "position removed from the output"
INTACT = "intact"
"""The model as it is, on the images of the knock-outs."""
SHARPNESS = "entropy, share of the most"
AT_INPUT, AT_OUTPUT = "positions at the input taken away", "positions at the output taken away"


class Key(NamedTuple):
    """A number of a record.

    Attributes:
        measure: what it is, such as ``r2`` or ``accuracy``.
        of: the spot, or what was done to the model; empty for the intact model.
        contents: ``permuted`` where the contents of the images were permuted; ``untrained`` of random weights.
        block, head: from 0; None where it is of the whole model, or of all heads.
        size, way: of the input, height x width in pixels, where it is not the record's; and how it was evaluated there.
    """

    measure: str
    of: str = ""
    contents: str = ""
    block: int | None = None
    head: int | None = None
    size: str = ""
    way: str = ""


Values = dict[Key, list[float]]
"""The numbers of a group under each key, one for each record that has it."""


def numbers(record: Diagnosis) -> dict[Key, float]:
    """Every number of a record; what is not known is not there."""
    found = {**dict(_of_tokens(record)), **dict(_of_answers(record)), **dict(_of_attention(record))}
    found |= dict(_of_sizes(record))
    found[Key("seconds per 1,000 images")] = 1000 * record.seconds / (record.fitted + record.held_out)
    return {key: value for key, value in found.items() if value is not None}


def _of_tokens(record: Diagnosis) -> Iterator[tuple[Key, float]]:
    spots: list[tuple[str, int | None, Tokens]] = []
    for number, layer in enumerate(record.layers):
        spots += [(INPUT, number, layer.input), (READ, number, layer.read)]
    spots.append((OUTPUT, None, record.output))
    for spot, block, tokens in spots:
        for contents, known in (("", tokens.as_they_are), ("permuted", tokens.permuted)):
            yield from _of_known(known, spot, contents, block)
    for (spot, block, _), tokens in zip(spots, record.untrained, strict=False):
        yield Key("r2", spot, "untrained", block), tokens.as_they_are.r2
        yield Key("r2", spot, "untrained, permuted", block), tokens.permuted.r2


def _of_known(known: Known, spot: str, contents: str, block: int | None) -> Iterator[tuple[Key, float]]:
    for measure, value in vars(known).items():
        yield Key(measure, spot, contents, block), value


def _of_answers(record: Diagnosis) -> Iterator[tuple[Key, float | None]]:
    yield Key("accuracy"), record.accuracy
    yield Key("accuracy", INTACT), record.intact
    changes: list[tuple[str, int | None, Outcome | None]] = [
        (name, None, outcome) for name, outcome in record.knock_outs.items()
    ]
    changes += [(AT_INPUT, None, record.input_taken_away), (AT_OUTPUT, None, record.output_taken_away)]
    for number, layer in enumerate(record.layers):
        changes += [(REMOVED, number, layer.removed), (TAKEN_AWAY, number, layer.taken_away)]
    changes.append((REMOVED_AT_OUTPUT, None, record.removed))
    for change, block, outcome in changes:
        if outcome is not None:
            yield Key("accuracy", change, block=block), outcome.accuracy
            yield Key("agreement", change, block=block), outcome.agreement


def _of_attention(record: Diagnosis) -> Iterator[tuple[Key, float]]:
    for block, layer in enumerate(record.layers):
        for measure, by_head in (("entropy", layer.entropy), ("distance", layer.distance)):
            yield Key(measure, block=block), mean(by_head)
            for head, value in enumerate(by_head):
                yield Key(measure, block=block, head=head), value
    yield Key(SHARPNESS), share_of_most([layer.entropy for layer in record.layers], record.tokens)


def _of_sizes(record: Diagnosis) -> Iterator[tuple[Key, float | None]]:
    for one in record.sizes:
        size = "x".join(map(str, one.size))
        yield Key("accuracy", size=size, way=one.way), one.accuracy
        for measure, by_layer in (("entropy", one.entropy), ("distance", one.distance)):
            for block, by_head in enumerate(by_layer):
                yield Key(measure, block=block, size=size, way=one.way), mean(by_head)
        yield Key(SHARPNESS, size=size, way=one.way), share_of_most(one.entropy, one.tokens)


def images_of(record: Diagnosis) -> str:
    """How many images there were, for the eye."""
    of_them = "" if record.judged == record.held_out else f", {record.judged} of these for knock-outs and attention"
    return f"{record.fitted} images to fit probes, {record.held_out} to judge{of_them}"


def share_of_most(entropy: Sequence[Sequence[float]], tokens: int) -> float:
    """Entropy of attention, by layer and head, as a part of that of attention to all tokens alike."""
    return mean(value for by_head in entropy for value in by_head) / math.log(tokens)


@dataclass(frozen=True)
class Group:
    """Records of one training with several seeds, or one record.

    Attributes:
        label: of the group, for the eye; unique.
    """

    label: str
    records: Sequence[Diagnosis]

    @property
    def first(self) -> Diagnosis:
        return self.records[0]

    def values(self, key: Key) -> list[float]:
        """The number of each record that has it."""
        return [found[key] for found in map(numbers, self.records) if key in found]

    def all_values(self) -> Values:
        """Every number, over the records."""
        found: Values = {}
        for record in self.records:
            for key, value in numbers(record).items():
                found.setdefault(key, []).append(value)
        return found

    def depth(self) -> int:
        return len(self.first.layers)


KNOCK_OUTS_FIRST = (ALL_TAKEN_AWAY, "places permuted", "contents permuted")
"""Those that come first in tables and pictures."""


def changes_of(groups: Sequence[Group]) -> list[str]:
    """The knock-outs of whole models that any group has, in the order in which they are shown."""
    found = dict.fromkeys(name for one in groups for name in one.first.knock_outs)
    found |= dict.fromkeys(
        change
        for change, attribute in ((AT_INPUT, "input_taken_away"), (AT_OUTPUT, "output_taken_away"))
        if any(getattr(one.first, attribute) is not None for one in groups)
    )
    return [name for name in KNOCK_OUTS_FIRST if name in found] + [
        name for name in found if name not in KNOCK_OUTS_FIRST
    ]
