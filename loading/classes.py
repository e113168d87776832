"""Names of classes, by which the labels of a data set and of a model are matched."""

from collections.abc import Collection, Sequence


def order_of_classes(names: Sequence[str], others: Sequence[str]) -> list[int] | None:
    """Where each of `names` stands among `others`; None where these are not the same names.

    Names in the same order have the order 0, 1, 2, ...
    """
    places = {name: place for place, name in enumerate(others)}
    if len(names) != len(others) or places.keys() != {*names}:
        return None
    return [places[name] for name in names]


def name_differences(names: Collection[str], where: str, others: Collection[str], elsewhere: str) -> str:
    """What only one side names: `only in train/: cat; only in val/: zcat`."""
    sides = {where: {*names} - {*others}, elsewhere: {*others} - {*names}}
    return "; ".join(f"only in {side}: {first_few(sorted(only))}" for side, only in sides.items() if only)


def first_few(names: Sequence[str], few: int = 5) -> str:
    """Names for a message: `a, b, c, d, e and 4 more`."""
    rest = f" and {len(names) - few} more" if len(names) > few else ""
    return ", ".join(names[:few]) + rest
