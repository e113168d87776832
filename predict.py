"""What a checkpoint sees on images, and its model as a file for other programs: `python predict.py --help`."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.download import is_url
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import end_in_one_line
from runtime.startup import start_command
from training.options import Parser, flag_of, image_size, whole

if TYPE_CHECKING:  # torch takes seconds to import: it comes once the command line is known to be right
    from torch import Tensor, nn

_logger = logging.getLogger(__name__)

EXPORTS = ("onnx", "pt2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own).

    Returns:
        The exit code: 0; 1 if an export computes something else than the model; 2 for bad input, each told in one line;
        130 if interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        args = read_options(argv)
        _logger.info("predict.py: %s is read", args.checkpoint)
        model = load_model(args)
        if args.export is not None:
            code = export(model, *args.export)
            if code or not args.images:
                return code
        return show(model, args)
    except (ValueError, OSError) as error:
        return _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _end("interrupted", 130)


_end = partial(end_in_one_line, "predict.py")


# ---- options


def build_parser() -> Parser:
    """All options of this command."""
    parser = Parser(
        prog="predict.py",
        usage="%(prog)s CHECKPOINT [IMAGE ...] [options]",
        description="Print the classes that a checkpoint finds most probable for images, or export its model.",
        epilog="In flags, - and _ mean the same. The results go to standard output, all else to standard error.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="of this project, of an original or of timm (.pth, .safetensors), an "
        "https: URL as main.py takes it, or a folder as timm writes it for the Hub")  # fmt: skip
    add("images", metavar="IMAGE", nargs="*", help="image files, and folders, of which all images are taken")
    add("--top", "--topk", type=whole(1), default=5, metavar="N", help="classes to print of each image; default: 5")
    add("--json", action="store_true", help="print one JSON object per image, a line each")
    add("--export", nargs=2, metavar=("KIND", "FILE"), help="write the model as onnx or pt2 (torch.export), and check "
        "that the file computes the same logits")  # fmt: skip
    add("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    add("--batch-size", type=whole(1), default=32, metavar="N", help="images computed at a time; default: 32")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda if there is one, else cpu")
    add = parser.add_argument_group("for a checkpoint that does not say what model it holds").add_argument
    add("--model", "--model-name", dest="model", metavar="NAME", help="a model of models_lape, or any of timm")
    add("--pe", metavar="NAME", help="its positional encoding, NAME or 'NAME(option=value)'")
    add("--join-type", metavar="NAME", help="how that reaches the layers")
    add("--input-size", type=image_size, metavar="S", help="side of its images, or HEIGHT,WIDTH, in pixels")
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        ValueError: flags that are unknown, or ask for nothing.
        FileNotFoundError: no such checkpoint or image.
    """
    args: argparse.Namespace = build_parser().parse_intermixed_args(argv)
    if not args.images and args.export is None:
        raise ValueError("name the images, or --export KIND FILE")
    if args.export is not None and args.export[0] not in EXPORTS:
        raise ValueError(f"--export {args.export[0]}: choose from {', '.join(EXPORTS)}")
    if not is_url(args.checkpoint) and not Path(args.checkpoint).expanduser().exists():
        raise FileNotFoundError(f"no checkpoint file {args.checkpoint}")
    args.images = [Path(path).expanduser() for path in args.images]
    if missing := next((path for path in args.images if not path.exists()), None):
        raise FileNotFoundError(f"no image {missing}")
    return args


# ---- the model


def load_model(args: argparse.Namespace) -> Any:
    """The model of the checkpoint, on its device.

    Raises:
        ValueError, OSError: see `lape_vit.load`; a model without classes, or of other images than RGB.
    """
    from lape_vit.from_checkpoint import OF_MODEL, load_described
    from lape_vit.images import data_config
    from runtime.distributed import pick_device
    from runtime.world import World
    from training.checkpoint import load_checkpoint

    device = pick_device(args.device, World())
    given = {name: getattr(args, name) for name in OF_MODEL}
    model, _ = load_described(load_checkpoint(args.checkpoint), args.checkpoint, given, flag_of, args.use_ema)
    if model.num_classes == 0:
        raise ValueError(f"{args.checkpoint} holds a model without classes: there is nothing to predict")
    if (channels := data_config(model)["input_size"][0]) != 3:
        raise ValueError(f"{args.checkpoint} holds a model of images of {channels} channels: predict.py reads RGB")
    return model.to(device)


def export(model: Any, kind: str, file: str) -> int:
    """Write the model to a file; returns the exit code.

    Raises:
        ValueError, OSError: a package that is missing, or a file that cannot be written.
    """
    from lape_vit.export import ExportError, export_model

    _logger.info("predict.py: %s is written and checked", file)
    for name in ("torch", "onnx_ir", "onnxscript"):  # which tell every step
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        difference = export_model(model.cpu(), file, kind)
    except ExportError as error:
        return _end(f"error: --export {kind} {file}: {error}", 1)
    except ImportError as error:
        raise ValueError(f"--export {kind} needs {error.name}: pip install onnx onnxscript onnxruntime") from error
    size = "x".join(map(str, (3, *model.pretrained_cfg["input_size"][1:])))
    _logger.info("%s: images (B, %s) to logits, which differ from the model's by at most %.1e", file, size, difference)
    return 0


# ---- predictions


def show(model: Any, args: argparse.Namespace) -> int:
    """Print the classes of every image; returns the exit code, which tells of images that cannot be read."""
    files = find_images(args.images)
    names, labels = class_names(model)
    is_bad = False
    for file, result in predict(model, files, args.batch_size):
        if isinstance(result, Exception):
            is_bad = True
            _logger.error("predict.py: error: %s", result)
            if args.json:
                print(json.dumps({"image": file, "error": str(result)}))
            continue
        probabilities, indices = result.topk(min(args.top, len(result)))
        found = list(zip(indices.tolist(), probabilities.tolist(), strict=True))
        if args.json:
            classes = [{"index": index, "class": labels[index], "probability": share} for index, share in found]
            print(json.dumps({"image": file, "classes": classes}))
        else:
            print(file, *(f"{100 * share:7.2f} %  {names[index]}" for index, share in found), sep="\n", flush=True)
    return 2 if is_bad else 0


def find_images(paths: Sequence[Path]) -> list[str]:
    """The files, and in the order of their names all images in the folders that are not hidden.

    Raises:
        FileNotFoundError: no image in a folder.
    """
    from loading.images import image_endings

    found = []
    for path in paths:
        inside = path.rglob("*") if path.is_dir() else ()
        images = [file for file in inside if file.suffix.lower() in image_endings()]
        shown = [file for file in images if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if path.is_dir() and not shown:
            raise FileNotFoundError(f"no image in {path}")
        found += sorted(map(str, shown)) if path.is_dir() else [str(path)]
    return found


def predict(model: Any, files: Sequence[str], batch_size: int) -> "Iterator[tuple[str, Tensor | Exception]]":
    """For each file in order, the probabilities of all classes (C,), or what is wrong with the file.

    Images are read and prepared as in evaluation.
    """
    import torch

    from lape_vit.images import image_transform

    device, transform = next(model.parameters()).device, image_transform(model)
    for first in range(0, len(files), batch_size):
        batch = files[first : first + batch_size]
        images = [read(file, transform) for file in batch]
        readable = [image for image in images if not isinstance(image, Exception)]
        with torch.inference_mode():
            answers = iter(model(torch.stack(readable).to(device)).float().softmax(-1).cpu() if readable else ())
        for file, image in zip(batch, images, strict=True):
            yield file, image if isinstance(image, Exception) else next(answers)


def read(file: str, transform: "Callable[[Any], Tensor]") -> "Tensor | Exception":
    from loading.images import UnreadableImageError, read_image

    try:
        return transform(read_image(file))
    except UnreadableImageError as error:
        return error


def class_names(model: "nn.Module") -> tuple[list[str], list[str | None]]:
    """What to call each class on the screen, and its name in the data set, if it is known.

    Classes of ImageNet, which are numbers of WordNet, are described in words. A model that names none and has as many
    as ImageNet is taken for one of those, and a line says so.
    """
    from timm.data import ImageNetInfo

    cfg: Any = model.pretrained_cfg
    labels = list(cfg.get("label_names") or [None] * cfg["num_classes"])
    imagenet = ImageNetInfo()
    if labels == [None] * imagenet.num_classes():
        labels = imagenet.label_names()
        _logger.info("the checkpoint names no classes: its %d are taken for those of ImageNet", len(labels))
    described = {label: imagenet.label_name_to_description(label) for label in {*labels} & {*imagenet.label_names()}}
    names = [
        f"class {index}" if label is None else f"{described[label]} ({label})" if label in described else label
        for index, label in enumerate(labels)
    ]
    return names, labels


if __name__ == "__main__":
    start_command("predict.py", read_options)
    raise_on_ctrl_c()
    sys.exit(main())
