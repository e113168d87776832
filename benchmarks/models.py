"""Training and evaluation step of every legal pair of an encoding and a join, next to timm's model of the same size.

python -m benchmarks.models [--model NAME ...] [--step NAME ...] [--pe NAME ...] [--join-type NAME ...] [--compile] ...

All models take turns, a step each; a ratio is the median of the ratios to the reference's step of the same round, with
its quartiles. A training step is forward, cross-entropy, backward and a step of fused AdamW.
"""

from benchmarks.options import FORWARD, MODELS, STEPS, models_parser
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("python -m benchmarks.models", models_parser().parse_args)

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.deit import deit_small_patch16_224, deit_tiny_patch16_224  # timm's own: models_lape registers others
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import MemoryMeter, Timings, alternate, describe_machine, matmul_flops
from comparison.plan import sort_pairs
from comparison.tables import NAMES, Pair
from lape_vit.compact import CompactMlp
from lape_vit.encodings import ENCODINGS
from lape_vit.joins import JOINS, legal_joins
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import start_logging
from runtime.tables import Row, print_table


def timms_compact(**kwargs: Any) -> nn.Module:
    """timm's model of the size of ``vit_compact_patch4_32``, with the same dropout."""
    return VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=128,
        depth=6,
        num_heads=4,
        mlp_ratio=2.0,
        no_embed_class=True,
        pos_drop_rate=0.1,
        proj_drop_rate=0.1,
        mlp_layer=CompactMlp,
        **kwargs,
    )


TIMMS: dict[str, Callable[..., nn.Module]] = dict(
    zip(MODELS, (deit_tiny_patch16_224, deit_small_patch16_224, timms_compact), strict=True)
)
NUM_CLASSES = 10


def maker(name: str, pair: Pair | None) -> Callable[..., nn.Module]:
    """Makes our model with a pair, or timm's for None."""
    if pair is None:
        return TIMMS[name]
    return partial(timm.create_model, name, pe=pair[0], join_type=pair[1])


def reference_of(pair: Pair | None, reference: str) -> Pair | None:
    return None if pair is None or reference == "timm" else (pair[0], reference)


@dataclass(frozen=True)
class Setting:
    """How all models are run."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    batch_size: int
    repeats: int

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Workload:
    """A model with its data and its optimiser."""

    def __init__(self, make: Callable[..., nn.Module], setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.model = make(num_classes=NUM_CLASSES).to(setting.device)
        size = self.model.patch_embed.img_size  # type: ignore[union-attr]
        self.images = torch.randn(setting.batch_size, 3, *size, device=setting.device)  # type: ignore[misc]
        self.labels = torch.randint(NUM_CLASSES, (setting.batch_size,), device=setting.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.call = torch.compile(self.model) if setting.compiled else self.model

    @torch.no_grad()
    def forward(self) -> Tensor:
        with self.setting.autocast():
            return self.call(self.images)

    def train(self) -> None:
        with self.setting.autocast():
            loss = F.cross_entropy(self.call(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def training_flops(workload: Workload) -> int:
    """Of the matrix products of one training step."""
    workload.model.train()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(workload.model(workload.images), workload.labels).backward()
    workload.optimizer.zero_grad()
    return counter.get_total_flops()


def peak_memory(make: Callable[..., nn.Module], setting: Setting, step: str = "train") -> int:
    """Of a model, its optimiser and two steps, ``train`` or ``forward``, in bytes."""
    meter = MemoryMeter(setting.device)
    workload = Workload(make, setting)
    workload.model.train(step == "train")
    for _ in range(2):
        getattr(workload, step)()
    return meter.peak()


def take_turns(workloads: Sequence[Workload], step: str, setting: Setting) -> list[Timings]:
    """Forward steps, which are shorter, are repeated `FORWARD` times as often."""
    for workload in workloads:
        workload.model.train(step == "train")
    repeats = setting.repeats * (1 if step == "train" else FORWARD)
    print(f"{len(workloads)} models take turns: {repeats} {step} steps each", file=sys.stderr)
    return alternate([getattr(workload, step) for workload in workloads], repeats, setting.device)


def measure(name: str, compared: Sequence[Pair | None], reference: str, step: str, setting: Setting) -> list[Row]:
    """A row of the table for each pair, and for another of timm's models: so much do two equals differ."""
    references = list(dict.fromkeys(reference_of(pair, reference) for pair in compared))
    models = [Workload(maker(name, pair), setting) for pair in (*references, *compared)]
    timings = take_turns(models, step, setting)
    peak_flops = matmul_flops(setting.device, setting.dtype)
    rows = []
    for number, pair in enumerate(compared, len(references)):
        other = references.index(reference_of(pair, reference))
        row = dict(zip(NAMES, pair or ("timm's, again", ""), strict=True))
        row["images/s"] = f"{setting.batch_size / timings[number].median:,.1f}"
        row[f"time / {reference}'s"] = str(timings[number].ratio_to(timings[other]))
        if step == "train":
            share = training_flops(models[number]) / timings[number].median / peak_flops
            row["share of matmul peak"] = f"{share:.0%}"
        rows.append(row)
    return rows


def compare_memory(name: str, compared: Sequence[Pair | None], reference: str, setting: Setting) -> list[str]:
    """Peak memory of each pair over that of the reference."""
    peaks: dict[Pair | None, int] = {}
    # A process of its own, as what makes memory measurable makes it slow.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        process.submit(peak_memory, maker(name, None), setting).result()  # loads what stays
        for one in (*compared, *(reference_of(pair, reference) for pair in compared)):
            if one not in peaks:
                peaks[one] = process.submit(peak_memory, maker(name, one), setting).result()
    return [f"{peaks[pair] / peaks[reference_of(pair, reference)]:.3f}" for pair in compared]


def main() -> None:
    parser = models_parser()
    args = parser.parse_args()
    try:
        pairs, _ = sort_pairs(args.pe or list(ENCODINGS), args.join_type or list(JOINS))
    except ValueError as error:
        parser.error(str(error))
    without = [pe for pe, _ in pairs if args.reference not in ("timm", *legal_joins(pe))]
    if without:
        parser.error(
            f"--reference {args.reference} cannot carry {', '.join(dict.fromkeys(without))}: name others by --pe"
        )
    compared = [None, *pairs] if args.reference == "timm" else pairs
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = start_logging(is_main=True)
    for name in args.model:
        batch_size = args.batch_size or (16 if name.endswith("224") else 128)
        setting = Setting(device, getattr(torch, args.dtype), args.compile, batch_size, args.repeats)
        mode = f"{args.dtype}, {'compiled' if args.compile else 'eager'}, batch {batch_size}"
        for step in args.step:
            rows = measure(name, compared, args.reference, step, setting)
            if step == "train" and MemoryMeter.can_measure(device):
                ratios = compare_memory(name, compared, args.reference, setting)
                memory = f"memory / {args.reference}'s"
                rows = [row | {memory: ratio} for row, ratio in zip(rows, ratios, strict=True)]
            print_table(console, f"{name}, {STEPS[step]}: {mode}; {describe_machine(device)}", rows, NAMES)


if __name__ == "__main__":
    raise_on_ctrl_c()
    main()
