"""The curves of a run: loss and accuracy over its epochs."""

from collections.abc import Mapping, Sequence
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAIN, TEST, TOP5, EMA = "#7a7a7a", "#0b5fa5", "#8fbfe0", "#d9730d"


def draw_curves(rows: Sequence[Mapping[str, Any]], file: IO[bytes], title: str) -> None:
    """Draw the rows of `log.txt`, one per epoch, into a PNG file: loss left, accuracy right."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    loss, accuracy = figure.subplots(1, 2)

    _line(loss, rows, "train_loss", "training (with its augmentation)", TRAIN)
    _line(loss, rows, "test_loss", "test", TEST)
    _line(loss, rows, "test_ema_loss", "test, averaged weights", EMA)
    loss.set_ylabel("loss (nats)")

    _line(accuracy, rows, "test_acc5", "test, top 5", TOP5)
    _line(accuracy, rows, "test_acc1", "test, top 1", TEST)
    _line(accuracy, rows, "test_ema_acc1", "test, top 1, averaged weights", EMA)
    best = max(rows, key=lambda row: row["test_acc1"])
    accuracy.plot(best["epoch"], best["test_acc1"], "o", color=TEST, markersize=9, fillstyle="none")
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_title(f"best top 1: {best['test_acc1']:.2f} % after epoch {best['epoch']}", fontsize=10)

    first, last = rows[0]["epoch"], rows[-1]["epoch"]
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(first - 0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(
            *zip(*points, strict=True), color=color, label=label, marker="o" if len(points) < 30 else None, ms=3.5
        )
