"""How fast a core loads images to train and to evaluate with, beside torchvision's reading and timm's transforms.

    python -m benchmarks.loader --data-path FOLDER

All pipelines have DeiT's recipe. They take turns at each batch, so that what else the machine does slows all of them.
"""

from benchmarks.options import loader_parser
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("python -m benchmarks.loader", loader_parser().parse_args)

import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from benchmarks.timing import describe_machine
from datasets import DATA_SETS
from loading.images import ImageSettings, read_image, read_pixels
from loading.transforms import Normalise, build_transform
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import start_logging
from runtime.seeding import AUGMENTATION, CROP, seed_everything
from runtime.tables import Row, print_table
from training.command_line import parser_of_main
from training.options import Options, find_recipe, read_recipe

SIZE = 224
BATCH = 64
"""Images that one pipeline loads before it is the next one's turn."""
STAGES = ("seed", "read", "decode", "crop and resize", "augment", "to tensor")
PLAIN = "torchvision and timm"


@dataclass(frozen=True)
class Pass:
    """Over the images of a batch: what each stage makes of what the one before made, the first of a path.

    Attributes:
        seeds: what each image is seeded for, if it is.
    """

    stages: dict[str, Callable[[Any], Any]]
    seeds: int | None


Pipeline = list[Pass]


def recipe() -> ImageSettings:
    """DeiT's options on ImageNet."""
    parser = parser_of_main()
    options = Options.of({**parser.defaults, **read_recipe(parser, find_recipe("deit"))})
    imagenet = DATA_SETS["IMNET"]
    return ImageSettings(options.data, options.augmentation, SIZE, imagenet.mean, imagenet.std)


def with_fast_crop(settings: ImageSettings, fast_crop: bool | None) -> ImageSettings:
    return replace(settings, augmentation=replace(settings.augmentation, fast_crop=fast_crop))


def pipelines(is_train: bool) -> dict[str, Pipeline]:
    """Those to compare, by name: the plain one first, ours as it is by default last."""
    deit = recipe()
    data, augmentation = deit.data, deit.augmentation
    if not is_train:
        resize, crop, *finish = create_transform(
            SIZE, interpolation=data.interpolation, crop_pct=data.eval_crop_ratio
        ).transforms
        plain = _plain(Compose([resize, crop]), Compose([]), Compose(finish))
        return {PLAIN: plain, "ours": _ours(False, read_image, build_transform(False, deit, is_small=False))}
    transforms = create_transform(
        SIZE,
        is_training=True,
        hflip=augmentation.hflip,
        auto_augment=augmentation.aa,
        interpolation=augmentation.train_interpolation,
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
        separate=True,
    )
    return {PLAIN: _plain(*transforms)} | {
        name: _ours(True, decode, build_transform(True, with_fast_crop(deit, fast_crop), is_small=False))
        for name, fast_crop, decode in (("ours, --no-fast-crop", False, read_image), ("ours", None, read_pixels))
    }


def _plain(*transforms: Compose) -> Pipeline:
    steps = (Path.read_bytes, _decode, *transforms)
    return [Pass(dict(zip(STAGES[1:], steps, strict=True)), seeds=None)]


def _ours(is_train: bool, decode: Callable[[bytes], Any], transform: Compose) -> Pipeline:
    """As `loading.loader.ImageLoader` loads a batch."""
    crop, finish = transform.transforms
    steps = finish.transforms
    to_tensor = next(number for number, step in enumerate(steps) if isinstance(step, Normalise))
    first = (Path.read_bytes, decode, crop)
    last = (Compose(steps[:to_tensor]), Compose(steps[to_tensor:]))
    return [
        Pass(dict(zip(STAGES[1:4], first, strict=True)), seeds=CROP),
        Pass(dict(zip(STAGES[4:], last, strict=True)), seeds=AUGMENTATION if is_train else None),
    ]


def _decode(content: bytes) -> Image.Image:
    """As torchvision's `pil_loader`."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def measure(is_train: bool, repeats: int, files: Sequence[Path]) -> np.ndarray:
    """Milliseconds per image, (repeats, pipelines, stages, 2): of this process's CPU, and of the clock on the wall."""
    torch.set_num_threads(1)
    compared = list(pipelines(is_train).values())
    times = np.zeros((1 + repeats, len(compared), len(STAGES), 2))  # once more, to warm up
    for repeat in range(1 + repeats):
        for first, turn in product(range(0, len(files), BATCH), range(len(compared))):
            place = (first // BATCH + turn) % len(compared)
            batch = dict(enumerate(files[first : first + BATCH], first))
            load(compared[place], batch, repeat, times[repeat, place])
    return times[1:] / len(files) * 1000


def load(pipeline: Pipeline, batch: dict[int, Any], epoch: int, times: np.ndarray) -> None:
    """Turn paths, by their places in the epoch, into images, and add to what each stage took: (stages, 2)."""
    for one in pipeline:
        stages = ["seed"] * (one.seeds is not None) + [*one.stages]
        taken = [STAGES.index(stage) for stage in stages]
        for number, value in batch.items():
            stamps = [_now()]
            if one.seeds is not None:
                seed_everything(0, one.seeds, epoch, number)
                stamps.append(_now())
            for step in one.stages.values():
                value = step(value)
                stamps.append(_now())
            batch[number] = value
            times[taken] += np.diff(stamps, axis=0)


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def measure_on_cores(is_train: bool, repeats: int, files: Sequence[Path], workers: int) -> np.ndarray:
    """As `measure`, on average over processes that share out the files and run at the same time."""
    shares = [files[worker::workers] for worker in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
        return np.mean(list(processes.map(partial(measure, is_train, repeats), shares)), axis=0)


def rows_of(names: Sequence[str], times: np.ndarray) -> list[Row]:
    """Medians over the repeats, with half the range that the repeats span."""
    cpu, wall = times.sum(axis=2).transpose(2, 0, 1)
    stages = {
        f"{stage}, ms": [f"{value:.3f}" for value in np.median(times[:, :, number, 0], axis=0)]
        for number, stage in enumerate(STAGES)
    }
    sums = {
        "all, ms": (cpu, 3),
        "images/s of a core's time": (1000 / cpu, 0),
        "images/s by the clock": (1000 / wall, 0),
        "times as fast": (cpu[:, :1] / cpu, 2),
    }
    lines = stages | {
        what: [_with_spread(column, digits) for column in values.T] for what, (values, digits) in sums.items()
    }
    return [{"per image": what} | dict(zip(names, cells, strict=True)) for what, cells in lines.items()]


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
    parser = loader_parser()
    args = parser.parse_args()
    console = start_logging(is_main=True)
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
            rows = rows_of(list(pipelines(is_train)), times)
            print_table(console, f"{title}; {describe_machine(torch.device('cpu'))}", rows, ("per image",))
            cpu = times[..., 0].sum(axis=2)
            ratios.append(f"{split} {_with_spread(cpu[:, 0] / cpu[:, -1], 2)}")
    console.print(f"times as fast as {PLAIN}, per core: {', '.join(ratios)}", soft_wrap=True)


if __name__ == "__main__":
    raise_on_ctrl_c()
    main()
