"""How fast a core loads batches to train and to evaluate with, beside timm's loaders.

    python -m benchmarks.loader --data-path FOLDER

All pipelines have DeiT's recipe, and each runs in processes of its own, as each keeps memory in its own way. They take
turns at each batch, so that what else the machine does slows all of them. timm's prefetching loader and ours leave
normalisation and erasing to the device; here that is the CPU, whose time counts.
"""

from benchmarks.options import loader_parser
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("python -m benchmarks.loader", loader_parser().parse_args)

import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.loader import create_loader
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import Compose

from benchmarks.timing import describe_machine
from datasets import DATA_SETS
from loading.images import Batching, Finishing, ImageSettings, Sample, read_image, read_pixels
from loading.transforms import build_transform
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import start_logging
from runtime.memory import keep_freed_memory
from runtime.seeding import CROP, seed_everything
from runtime.tables import Row, print_table
from training.command_line import parser_of_main
from training.options import Options, find_recipe, read_recipe

SIZE = 224
BATCH = 64
"""Images that one pipeline loads before it is the next one's turn."""
STAGES = ("seed", "read", "decode", "crop and resize", "augment and collate", "normalise and erase")
PLAIN = "torchvision and timm"
PREFETCHING = "timm, prefetching"
OURS = "ours"


@dataclass(frozen=True)
class Pipeline:
    """From the paths of a batch to its images.

    Attributes:
        stages: by name, what each makes of what the one before made of an image, the first of a path.
        batch_stages: likewise of a batch, the first of a list of (what the stages made, label, place).
        seeds: whether each image is seeded for its crop.
        keeps_memory: whether its processes keep freed memory.
    """

    stages: dict[str, Callable[[Any], Any]]
    batch_stages: dict[str, Callable[[Any], Any]]
    seeds: bool = False
    keeps_memory: bool = False


def recipe() -> ImageSettings:
    """DeiT's options on ImageNet."""
    parser = parser_of_main()
    options = Options.of({**parser.defaults, **read_recipe(parser, find_recipe("deit"))})
    imagenet = DATA_SETS["IMNET"]
    return ImageSettings(options.data, options.augmentation, SIZE, imagenet.mean, imagenet.std)


def with_fast_crop(settings: ImageSettings, fast_crop: bool | None) -> ImageSettings:
    return replace(settings, augmentation=replace(settings.augmentation, fast_crop=fast_crop))


@cache
def pipelines(is_train: bool) -> dict[str, Pipeline]:
    """Those to compare, by name: the plain one first, ours as it is by default last."""
    deit = recipe()
    pipelines = {PLAIN: _plain(is_train, deit), PREFETCHING: _prefetching(is_train, deit)}
    if is_train:
        pipelines["ours, --no-fast-crop"] = _ours(is_train, with_fast_crop(deit, False), read_image)
    return pipelines | {OURS: _ours(is_train, deit, read_pixels if is_train else read_image)}


def _timms_options(is_train: bool, deit: ImageSettings) -> dict[str, Any]:
    data, augmentation = deit.data, deit.augmentation
    if not is_train:
        return {"interpolation": data.interpolation, "crop_pct": data.eval_crop_ratio}
    return {
        "is_training": True,
        "hflip": augmentation.hflip,
        "auto_augment": augmentation.aa,
        "interpolation": augmentation.train_interpolation,
        "re_prob": augmentation.reprob,
        "re_mode": augmentation.remode,
        "re_count": augmentation.recount,
    }


def _plain(is_train: bool, deit: ImageSettings) -> Pipeline:
    """A worker erases and normalises each image, and collates the batch."""
    crop, flip_or_centre, *augment_and_finish = create_transform(SIZE, **_timms_options(is_train, deit)).transforms
    number = 1 if is_train else 0  # of policies; the rest makes a tensor, normalises and erases
    augment, finish = Compose(augment_and_finish[:number]), Compose(augment_and_finish[number:])
    steps = (Path.read_bytes, _decode, Compose([crop, flip_or_centre]), augment)
    return Pipeline(
        dict(zip(STAGES[1:], (*steps, finish), strict=True)), {STAGES[4]: lambda batch: default_collate(batch)[0]}
    )


class _NoImages(Dataset):
    """Whom timm's `create_loader` gives the transform."""

    transform: Compose

    def __len__(self) -> int:
        return BATCH


def _prefetching(is_train: bool, deit: ImageSettings) -> Pipeline:
    """`timm.data.create_loader(use_prefetcher=True)`: a worker collates pixels, and the device does the rest."""
    images = _NoImages()
    loader: Any = create_loader(
        images,  # type: ignore[arg-type]  # of timm's data sets it needs no more than this
        SIZE,
        BATCH,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        **_timms_options(is_train, deit),
    )
    crop, flip_or_centre, *augment, to_numpy = images.transform.transforms
    collate = loader.loader.collate_fn

    def finish(batch: Any) -> Tensor:
        loader.loader = [batch]
        ((images, _),) = loader
        return images

    steps = (Path.read_bytes, _decode, Compose([crop, flip_or_centre]), Compose([*augment, to_numpy]))
    return Pipeline(
        dict(zip(STAGES[1:5], steps, strict=True)),
        {STAGES[4]: lambda batch: collate([(image, label) for image, label, _ in batch]), STAGES[5]: finish},
    )


def _ours(is_train: bool, settings: ImageSettings, decode: Callable[[bytes], Any]) -> Pipeline:
    """As `loading.loader.ImageLoader` loads a batch."""
    crop, augment, finish = build_transform(is_train, settings, is_small=False).transforms
    seed = settings.seed if is_train else None
    batching, finishing = Batching(augment, seed), Finishing(finish.transforms, seed, torch.device("cpu"))
    return Pipeline(
        dict(zip(STAGES[1:4], (Path.read_bytes, decode, crop), strict=True)),
        {
            STAGES[4]: lambda batch: batching([Sample(image, label, place, "") for image, label, place in batch]),
            STAGES[5]: lambda loaded: finishing(loaded[0][0], loaded[1]),
        },
        seeds=True,
        keeps_memory=True,
    )


def _decode(content: bytes) -> Image.Image:
    """As torchvision's `pil_loader`."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def measure(
    is_train: bool, repeats: int, shares: Sequence[Sequence[Path]], processes: Mapping[str, Executor]
) -> np.ndarray:
    """Milliseconds per image, (repeats, pipelines, stages, 2): of a process's CPU, and of the clock on the wall.

    Args:
        shares: of the files, one for each process of a pipeline; their times are averaged.
        processes: of each pipeline.
    """
    compared = list(pipelines(is_train))
    times = np.zeros((1 + repeats, len(compared), len(STAGES), 2))  # once more, to warm up
    for repeat in range(1 + repeats):
        for first, turn in product(range(0, len(shares[0]), BATCH), range(len(compared))):
            number = (first // BATCH + turn) % len(compared)
            batches = [share[first : first + BATCH] for share in shares]
            load_share = partial(load, is_train, compared[number], repeat, first)
            times[repeat, number] += np.mean(list(processes[compared[number]].map(load_share, batches)), axis=0)
    return times[1:] / len(shares[0]) * 1000


def load(is_train: bool, name: str, epoch: int, first: int, files: Sequence[Path]) -> np.ndarray:
    """What each stage of a pipeline takes for a batch: (stages, 2), seconds."""
    times = np.zeros((len(STAGES), 2))
    load_batch(pipelines(is_train)[name], {(epoch, first + number): file for number, file in enumerate(files)}, times)
    return times


def load_batch(pipeline: Pipeline, files: Mapping[tuple[int, int], Path], times: np.ndarray) -> Tensor:
    """Turn paths, by their places, into images (B, 3, H, W), and add to what each stage took: (stages, 2)."""

    def timed(stage: str, step: Callable[..., Any], *values: Any) -> Any:
        start = time.process_time(), time.perf_counter()
        result = step(*values)
        times[STAGES.index(stage)] += time.process_time() - start[0], time.perf_counter() - start[1]
        return result

    batch: Any = []
    for place, value in files.items():
        if pipeline.seeds:
            timed(STAGES[0], seed_everything, 0, CROP, *place)
        for stage, step in pipeline.stages.items():
            value = timed(stage, step, value)
        batch.append((value, 0, place))
    for stage, step in pipeline.batch_stages.items():
        batch = timed(stage, step, batch)
    return batch


def start_process(keeps_memory: bool) -> None:
    torch.set_num_threads(1)
    if keeps_memory:
        keep_freed_memory()


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
        shares = [files[worker :: args.workers][: len(files) // args.workers] for worker in range(args.workers)]
        ratios = []
        with ExitStack() as stack:
            processes = {
                name: stack.enter_context(
                    ProcessPoolExecutor(
                        args.workers,
                        mp_context=get_context("spawn"),
                        initializer=start_process,
                        initargs=(pipeline.keeps_memory,),
                    )
                )
                for name, pipeline in pipelines(is_train=True).items()
            }
            for split, is_train in (("training", True), ("evaluation", False)):
                times = measure(is_train, args.repeats, shares, processes)
                title = f"{split}: {len(files)} images, {args.workers} process(es), median of {args.repeats} passes"
                rows = rows_of(list(pipelines(is_train)), times)
                print_table(console, f"{title}; {describe_machine(torch.device('cpu'))}", rows, ("per image",))
                cpu = times[..., 0].sum(axis=2)
                ratios.append(f"{split} {_with_spread(cpu[:, 0] / cpu[:, -1], 2)}")
    console.print(f"times as fast as {PLAIN}, per core: {', '.join(ratios)}", soft_wrap=True)


if __name__ == "__main__":
    raise_on_ctrl_c()
    main()
