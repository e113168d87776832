"""How fast a core loads images to train and to evaluate with, beside torchvision's reading and timm's transforms.

    python -m benchmarks.loader --data-path FOLDER

All pipelines have DeiT's recipe. They take turns at each few images, with the same random states, so that what else the
machine does slows all of them.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from datasets import DATA_SETS, build_transform
from lape_vit.encodings import all_options
from training.images import read_image, read_pixels
from training.options import build_parser, find_recipe, read_recipe, whole
from training.seeding import AUGMENTATION, seed_everything

SIZE = 224
BLOCK = 16
"""Images that one pipeline loads before it is the next one's turn."""
STAGES = ("seed", "read", "decode", "crop and resize", "augment", "to tensor")
PLAIN = "torchvision and timm"

Pipeline = dict[str, Callable[[Any], Any]]  # from the path on, what each stage makes of what the one before made


def pipelines(is_train: bool) -> dict[str, Pipeline]:
    """Those to compare, by name: the plain one first, ours as it is by default last."""
    parser = build_parser(all_options())
    deit, imagenet = read_recipe(parser, find_recipe("deit")), DATA_SETS["IMNET"]
    args = argparse.Namespace(
        **{**parser.defaults, **deit, "input_size": SIZE, "mean": imagenet.mean, "std": imagenet.std}
    )
    if not is_train:
        resize, crop, *finish = create_transform(
            SIZE, interpolation=args.interpolation, crop_pct=args.eval_crop_ratio
        ).transforms
        our_resize, our_crop, *our_finish = build_transform(False, args).transforms
        return {
            PLAIN: _stages(_decode, [resize, crop], [], finish),
            "ours": _stages(read_image, [our_resize, our_crop], [], our_finish),
        }
    plain = create_transform(
        SIZE,
        is_training=True,
        hflip=args.hflip,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        separate=True,
    )
    compared = {PLAIN: _stages(_decode, *([part] for part in plain))}
    for name, fast_crop, decode in (("ours, --no-fast-crop", False, read_image), ("ours", None, read_pixels)):
        crop, augment, *finish = build_transform(
            True, argparse.Namespace(**{**vars(args), "fast_crop": fast_crop})
        ).transforms
        compared[name] = _stages(decode, [crop], [augment], finish)
    return compared


def _decode(content: bytes) -> Image.Image:
    """As torchvision's `pil_loader`."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def _stages(decode: Callable[[bytes], Any], crop: list, augment: list, finish: list) -> Pipeline:
    steps = (Path.read_bytes, decode, Compose(crop), Compose(augment), Compose(finish))
    return dict(zip(STAGES[1:], steps, strict=True))


def measure(is_train: bool, repeats: int, files: Sequence[Path]) -> np.ndarray:
    """Milliseconds per image, (repeats, pipelines, stages, 2): of this process's CPU, and of the clock on the wall."""
    torch.set_num_threads(1)
    compared = list(pipelines(is_train).values())
    times = np.zeros((1 + repeats, len(compared), len(STAGES), 2))  # once more, to warm up
    for repeat in range(1 + repeats):
        for first, turn in product(range(0, len(files), BLOCK), range(len(compared))):
            place = (first // BLOCK + turn) % len(compared)
            for number, file in enumerate(files[first : first + BLOCK], first):
                value: Any = file
                stamps = [_now()]
                seed_everything(0, AUGMENTATION, repeat, number)
                stamps.append(_now())
                for step in compared[place].values():
                    value = step(value)
                    stamps.append(_now())
                times[repeat, place] += np.diff(stamps, axis=0)
    times[:, 0, 0] = 0  # the plain pipeline does not seed each image
    return times[1:] / len(files) * 1000


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def measure_on_cores(is_train: bool, repeats: int, files: Sequence[Path], workers: int) -> np.ndarray:
    """As `measure`, on average over processes that share out the files and run at the same time."""
    shares = [files[worker::workers] for worker in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
        return np.mean(list(processes.map(partial(measure, is_train, repeats), shares)), axis=0)


def table_of(title: str, names: Sequence[str], times: np.ndarray) -> Table:
    """Medians over the repeats, with half the range that the repeats span."""
    table = Table(title=title, title_justify="left")
    table.add_column("ms per image")
    for name in names:
        table.add_column(name, justify="right")
    for number, stage in enumerate(STAGES):
        table.add_row(stage, *(f"{value:.3f}" for value in np.median(times[:, :, number, 0], axis=0)))
    cpu, wall = times.sum(axis=2).transpose(2, 0, 1)
    table.add_section()
    table.add_row("all", *(_with_spread(column, 3) for column in cpu.T))
    table.add_section()
    table.add_row("images/s of a core's time", *(_with_spread(column, 0) for column in 1000 / cpu.T))
    table.add_row("images/s by the clock", *(_with_spread(column, 0) for column in 1000 / wall.T))
    table.add_row("times as fast", *(_with_spread(column, 2) for column in (cpu[:, :1] / cpu).T))
    return table


def _with_spread(values: np.ndarray, digits: int) -> str:
    return f"{np.median(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"


def write_photos(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375, smooth and with a little noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = smooth + rng.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)


def main() -> None:
    """Measure, and print a table of training and one of evaluation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description="How fast a core loads images.")
    parser.add_argument("--data-path", type=Path, metavar="DIR", help="any folder of JPEGs; default: random ones")
    parser.add_argument("--images", type=whole(1), metavar="N", help="that many of them; default: all")
    parser.add_argument("--workers", type=whole(1), default=1, metavar="N", help="processes at a time; default: 1")
    parser.add_argument("--repeats", type=whole(1), default=5, metavar="N", help="passes over the images; default: 5")
    args = parser.parse_args()
    console = Console(highlight=False, width=110)
    with TemporaryDirectory() as temporary:
        if args.data_path is None:
            write_photos(Path(temporary), 64)
            console.print("no --data-path: 64 random JPEGs of 500 x 375, in a temporary folder")
        folder = args.data_path or Path(temporary)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[: args.images]
        if len(files) < args.workers:
            parser.error(f"{len(files)} JPEGs in --data-path {folder} are too few for --workers {args.workers}")
        ratios = []
        for split, is_train in (("training", True), ("evaluation", False)):
            times = measure_on_cores(is_train, args.repeats, files, args.workers)
            title = f"{split}: {len(files)} images, {args.workers} process(es), median of {args.repeats} passes"
            console.print(table_of(title, list(pipelines(is_train)), times))
            cpu = times[..., 0].sum(axis=2)
            ratios.append(f"{split} {_with_spread(cpu[:, 0] / cpu[:, -1], 2)}")
    console.print(f"times as fast as {PLAIN}, per core: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
