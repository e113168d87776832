"""All measures of one subject, over its images."""

from collections.abc import Sequence
from dataclasses import replace
from logging import getLogger

from comparison.options import WAYS
from comparison.sizes import takes
from diagnosis.subjects import Subject, short_name
from lape_vit.analysis.diagnosis import AtSize, Diagnosis, at_size, diagnose

_logger = getLogger(__name__)


def measure(
    subject: Subject, images: int, judged: int | None = None, sizes: Sequence[int] = (), ways: Sequence[str] = ()
) -> Diagnosis:
    """Diagnose a subject.

    Args:
        images: to look at, at most: a half fits probes, the other judges.
        judged: images of the other half for knock-outs and attention, at most; None for the default.
        sizes: sides of the input to look at besides, pixels.
        ways: to evaluate at these, of `comparison.sizes.WAYS`; those that the encoding cannot take are left out.

    Raises:
        ValueError, OSError: images that are too few, or cannot be read; a size that the patches do not fill.
    """
    fitted, held_out = subject.halves(images)
    name = short_name(subject.source)
    with subject.runtime.autocast():
        record = diagnose(
            subject.model,
            fitted.batches(f"{name}: probes"),
            held_out.batches(f"{name}: knock-outs"),
            subject.untrained,
            judged=judged,
        )
        at_sizes = [
            look_at_size(subject, images, record.judged, size, way)
            for way in ways
            if takes(subject.model.pe, way)
            for size in sizes
        ]
    _logger.info(
        "%s: %d images in %.0f s, %.0f s per 1,000 images",
        name,
        record.fitted + record.held_out,
        record.seconds,
        seconds_per_thousand(record),
    )
    return replace(record, sizes=at_sizes, about=subject.about)


def look_at_size(subject: Subject, images: int, judged: int, size: int, way: str) -> AtSize:
    """The model at another size, on the same held-out images, and its attention on those that `judged` counts."""
    model = subject.at_size(size, "--reference-grid" in WAYS[way], "--log-n" in WAYS[way])
    _, held_out = subject.halves(images, size)
    return at_size(model, held_out.batches(f"{short_name(subject.source)}: at {size}, {way}"), way, judged)


def seconds_per_thousand(record: Diagnosis) -> float:
    """How long 1,000 images take."""
    return 1000 * record.seconds / (record.fitted + record.held_out)
