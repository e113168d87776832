"""How time and memory grow with the number of patches, for every encoding, next to timm's model of the same size.

python -m benchmarks.resolution [--pe NAME ...] [--sides N ...] [--depth N] [--figure FILE] ...

At each size all models take turns, a step each; a ratio is the median of the ratios to timm's step of the same round.
Memory is the peak of a process that makes two steps of one model.
"""

from benchmarks.options import STEPS, resolution_parser
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("python -m benchmarks.resolution", resolution_parser().parse_args)

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.models import Setting, Workload, maker, peak_memory
from benchmarks.timing import MemoryMeter, alternate, describe_machine
from comparison.plan import sort_pairs
from comparison.tables import NAMES, Pair
from lape_vit.encodings import ENCODINGS
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import start_logging
from runtime.tables import Row, print_table

MODEL, PATCH = "deit_tiny_patch16_224", 16
Measured = dict[tuple[str, str], list[list[float]]]
"""By step and quantity: for each model, timm's first, the value at each size: timm's own, and the others' ratios."""


def makers(pairs: Sequence[Pair | None], side: int, depth: int) -> list[Callable[..., nn.Module]]:
    return [partial(maker(MODEL, pair), img_size=side * PATCH, depth=depth) for pair in pairs]


def times(makes: Sequence[Callable[..., nn.Module]], step: str, setting: Setting) -> list[float]:
    """Seconds of the first model, and the others' ratios to it."""
    workloads = [Workload(make, setting) for make in makes]
    for workload in workloads:
        workload.model.train(step == "train")
    first, *others = alternate([getattr(workload, step) for workload in workloads], setting.repeats, setting.device)
    return [first.median, *(other.ratio_to(first).median for other in others)]


def memories(makes: Sequence[Callable[..., nn.Module]], step: str, setting: Setting) -> list[float]:
    """MiB of the first model, and the others' ratios to it."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        process.submit(peak_memory, makes[0], setting, step).result()  # loads what stays
        first, *others = (process.submit(peak_memory, make, setting, step).result() for make in makes)
    return [first / 2**20, *(other / first for other in others)]


MEASURES = {"time": times, "memory": memories}


def measure(
    pairs: Sequence[Pair | None], sides: Sequence[int], depth: int, quantities: Sequence[str], setting: Setting
) -> Measured:
    measured: Measured = {}
    for side in sides:
        makes = makers(pairs, side, depth)
        for step in STEPS:
            for quantity in quantities:
                print(f"{side} x {side} patches: {quantity} of {STEPS[step]}s of {len(makes)} models", file=sys.stderr)
                values = MEASURES[quantity](makes, step, setting)
                for of_model, value in zip(
                    measured.setdefault((step, quantity), [[] for _ in makes]), values, strict=True
                ):
                    of_model.append(value)
    return measured


def rows_of(values: Sequence[Sequence[float]], pairs: Sequence[Pair], sides: Sequence[int], unit: str) -> list[Row]:
    """A row of timm's own values, and one of ratios for each pair."""
    columns = [f"{side} x {side}" for side in sides]
    named: list[tuple[Any, ...]] = [(f"timm's, {unit}", ""), *pairs]
    return [
        dict(zip(NAMES, name, strict=True))
        | {column: f"{value:,.3f}" for column, value in zip(columns, of_model, strict=True)}
        for name, of_model in zip(named, values, strict=True)
    ]


STANDS_OUT = 1.3
"""A ratio from which an encoding has a colour of its own in the figure."""


def draw(measured: Measured, pairs: Sequence[Pair], sides: Sequence[int], path: Path) -> None:
    """A panel for each step and quantity: the ratio to timm's over the side."""
    height = len(measured) // len(STEPS)
    figure = Figure(figsize=(11, 4 * height), layout="constrained")
    panels = figure.subplots(height, len(STEPS), squeeze=False, sharey="row").T.flat
    largest = [max(max(values[number]) for values in measured.values()) for number in range(1, len(pairs) + 1)]
    coloured = [pair for pair, most in zip(pairs, largest, strict=True) if most >= STANDS_OUT]
    for panel, ((step, quantity), values) in zip(panels, measured.items(), strict=True):
        for pair, ratios in zip(pairs, values[1:], strict=True):
            style: dict[str, Any] = {"color": "0.75", "zorder": 1}
            if pair in coloured:
                number = coloured.index(pair)
                style = {"color": f"C{number % 10}", "marker": "osv^D"[number // 10 % 5], "label": ", ".join(pair)}
            panel.plot(sides, ratios, markersize=4, **style)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xticks(sides, [f"{side} x {side}" for side in sides])
        panel.set_xlabel("patches")
        panel.set_ylabel(f"{quantity} / timm's")
        panel.set_title(f"{quantity}, {STEPS[step]}")
    handles, labels = panel.get_legend_handles_labels()
    title = f"grey: below {STANDS_OUT} everywhere"
    figure.legend(handles, labels, loc="outside right center", fontsize="small", title=title, title_fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = resolution_parser()
    args = parser.parse_args()
    try:
        pairs, _ = sort_pairs(args.pe or list(ENCODINGS), args.join_type)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "memory" in args.measure and not MemoryMeter.can_measure(device):
        parser.error("--measure memory: memory is measured on Linux or on a GPU; name time alone")
    setting = Setting(device, getattr(torch, args.dtype), False, args.batch_size, args.repeats)
    console = start_logging(is_main=True)
    measured = measure([None, *pairs], args.sides, args.depth, args.measure, setting)
    units = {"time": "s", "memory": "MiB"}
    for (step, quantity), values in measured.items():
        title = f"{quantity}, {STEPS[step]}: {MODEL}, {args.depth} blocks, batch {args.batch_size}, {args.dtype}"
        rows = rows_of(values, pairs, args.sides, units[quantity])
        print_table(console, f"{title}; {describe_machine(device)}", rows, NAMES)
    if args.figure is not None:
        draw(measured, pairs, args.sides, args.figure)


if __name__ == "__main__":
    raise_on_ctrl_c()
    main()
