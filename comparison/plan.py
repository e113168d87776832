"""What a comparison consists of: its runs, and the options of each."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml

from comparison.options import ALL
from datasets import DATA_SETS
from lape_vit.encodings import all_options, canonical_name, names, resolve
from lape_vit.joins import JOINS, legal_joins
from runtime.distributed import pick_device
from runtime.world import World
from training.command_line import parser_of_main
from training.folder import CHECKPOINTS, read_log
from training.options import (
    MOST_WORKERS,
    OptionParser,
    Options,
    config_text,
    flag_of,
    saved_options,
)
from training.setup import pick_recipe, read_given, resolve_device_options, resolve_given

_logger = getLogger(__name__)

VARIED = {"pe", "join_type", "seed", *all_options()}
"""Options in which the runs of a comparison differ."""
HARMLESS = {
    "checkpoint_steps",
    "compile",
    "data_path",
    "deterministic",
    "device",
    "dist_eval",
    "eval_data_path",
    "max_bad_steps",
    "num_workers",
    "pin_mem",
    "tensorboard",
}
"""Options that may change between two calls, for a run learns the same under them."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        options: of `main.py`, as it saves them in `config.yaml`.
        argv: its command line without the folder.
    """

    pe: str
    join_type: str
    seed: int
    folder: Path
    options: dict[str, Any]
    argv: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.pe}, {self.join_type}, seed {self.seed}"

    @property
    def pair(self) -> tuple[str, str]:
        return self.pe, self.join_type

    @property
    def epochs(self) -> int:
        return self.options["epochs"]

    @property
    def best_checkpoint(self) -> Path:
        return self.folder / CHECKPOINTS[1]

    def rows(self) -> list[dict[str, Any]]:
        """Its `log.txt` so far, a row per epoch."""
        return read_log(self.folder / "log.txt", self.epochs)

    def last_options(self) -> dict[str, Any]:
        """Those of its `config.yaml`, which the last call of `main.py` wrote; none before the first."""
        path = self.folder / "config.yaml"
        return read_config(path) if path.exists() else {}

    def epochs_done(self) -> int:
        """Those that need not be trained again."""
        rows = self.rows()
        return rows[-1]["epoch"] if rows and (self.folder / CHECKPOINTS[0]).is_file() else 0

    def is_finished(self) -> bool:
        """Whether all epochs are in its log, and in its checkpoint, which is written after the log."""
        log, checkpoint = self.folder / "log.txt", self.folder / CHECKPOINTS[0]
        return self.epochs_done() >= self.epochs and checkpoint.stat().st_mtime >= log.stat().st_mtime


@dataclass(frozen=True)
class Plan:
    """All that a call of `compare.py` is to do.

    Attributes:
        runs: those that the call names.
        others: those that earlier calls have finished in the same folder.
        illegal: pairs that are skipped.
        common: the options that all runs share.
        options: all options of one of the runs, as `main.py` knows them.
    """

    folder: Path
    runs: list[Run]
    others: list[Run]
    illegal: list[tuple[str, str]]
    common: dict[str, Any]
    options: Options

    @property
    def all_runs(self) -> list[Run]:
        """In the order of the registries."""
        return sorted([*self.runs, *self.others], key=lambda run: (*place_in_registries(*run.pair), run.seed))

    def finished(self) -> list[Run]:
        return [run for run in self.all_runs if run.is_finished()]


def check_can_share(plan: Plan) -> None:
    """Raise ValueError where runs cannot share batches."""
    data_set = plan.options.data.data_set
    if DATA_SETS[data_set].is_sharded:
        raise ValueError(f"--share-batches means nothing to {data_set}: leave it out")


def place_in_registries(pe: str, join_type: str) -> tuple[int, list[int], str, int]:
    """What sorts pairs: single encodings first, then in the order of the registries, then by options."""
    parts = [names().index(part.name) for part in resolve(pe).parts]
    return len(parts), parts, pe, list(JOINS).index(join_type)


def make_plan(args: argparse.Namespace, rest: Sequence[str]) -> Plan:
    """The plan of the own options `args` of `compare.py`, and of the `rest` of its command line.

    Raises:
        ValueError, OSError: an unknown flag, encoding or join, no legal pair, or a folder with runs of other options.
    """
    parser = parser_of_main()
    given = read_given(parser, rest)
    joins = spelled_out(args.join_type, JOINS)
    legal, illegal = sort_pairs(with_options(args), joins)
    if ALL in args.join_type:
        illegal = []
    if "num_workers" not in {**pick_recipe(parser, given, {}), **given}:
        workers = min(MOST_WORKERS, max(1, count_cores() // args.jobs))
        rest = [*rest, "--num-workers", str(workers)]

    folder, runs = Path(args.output_dir).expanduser(), []
    for seed in args.seeds:  # so that a comparison that is stopped early has something of every pair
        for pe, join_type in legal:
            argv = (*rest, "--pe", pe, "--join-type", join_type, "--seed", str(seed))
            options, saved = resolve_run(parser, argv)
            runs.append(Run(pe, join_type, seed, folder / f"{pe}_{join_type}_seed{seed}", saved, argv))
    common = {name: value for name, value in runs[0].options.items() if name not in VARIED}
    others = list(earlier_runs(folder, runs))
    check_options([*runs, *others], common, parser)
    return Plan(folder, runs, [run for run in others if run.is_finished()], illegal, common, options)


def sort_pairs(encodings: Sequence[str], joins: Sequence[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The legal and the illegal pairs of (encoding, join), each in the order given.

    Args:
        encodings: in their canonical form.

    Raises:
        ValueError: an unknown join, a name that is given twice, or no legal pair.
    """
    for flag, values in (("--pe", encodings), ("--join-type", joins)):
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{flag} names {value} twice")
    if unknown := [join for join in joins if join not in JOINS]:
        raise ValueError(f"unknown --join-type {unknown[0]!r}: choose from {', '.join(JOINS)}")
    pairs = [(pe, join) for pe in encodings for join in joins]
    legal = [(pe, join) for pe, join in pairs if join in legal_joins(pe)]
    if not legal:
        joined = "; ".join(f"{pe}: {', '.join(legal_joins(pe))}" for pe in encodings)
        raise ValueError(f"none of the pairs of --pe and --join-type is legal; the legal joins are {joined}")
    return legal, [pair for pair in pairs if pair not in legal]


def spelled_out(words: Sequence[str], known: Iterable[str]) -> list[str]:
    """The names with all known ones in place of `all`."""
    return [name for word in words for name in (known if word == ALL else [word])]


def with_options(args: argparse.Namespace) -> list[str]:
    """The encodings in their canonical form, each with those of the options given that it takes.

    Raises:
        ValueError: an unknown encoding, or an option that none of them takes.
    """
    given = {name: getattr(args, name) for name in all_options() if getattr(args, name) is not None}
    encodings, taken = [], set()
    for pe in spelled_out(args.pe, names()):
        try:
            own = given.keys() & resolve(pe).options().keys()
            encodings.append(canonical_name(pe, {name: given[name] for name in own}))
        except TypeError as error:
            raise ValueError(f"--pe {pe}: {error}") from error
        taken |= own
    for name in given.keys() - taken:
        raise ValueError(f"{flag_of(name)} is an option of {', '.join(all_options()[name][1])}, which is not compared")
    return encodings


def resolve_run(parser: OptionParser, argv: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """What `main.py` makes of this command line, and what it will save of it in `config.yaml`; no model is built.

    Raises:
        ValueError, OSError: what it refuses.
    """
    options, _ = resolve_given(parser, read_given(parser, argv), {})
    options = resolve_device_options(options, pick_device(options.run.device, World()))
    saved = yaml.safe_load(config_text(saved_options(options), ""))
    encoding = resolve(
        options.model.pe or "", {name: value for name, value in options.model.encoding.items() if value is not None}
    )
    return options, {**saved, "pe": encoding.name, **encoding.options()}


def earlier_runs(folder: Path, runs: Sequence[Run]) -> Iterator[Run]:
    """The runs in a folder that are not among `runs`."""
    ours = {run.folder for run in runs}
    for path in sorted(folder.glob("*/config.yaml")):
        if path.parent not in ours:
            options = read_config(path)
            yield Run(options["pe"], options["join_type"], options["seed"], path.parent, options)


def check_options(runs: Sequence[Run], common: dict[str, Any], parser: OptionParser) -> None:
    """See that what is in the folder was made with today's options; log what differs and does no harm.

    Raises:
        ValueError: it was not.
    """
    harmless: dict[str, str] = {}
    for run in runs:
        saved = run.last_options()
        if not saved:
            continue
        now, was = {**run.options, **common}, {**parser.defaults, **saved}
        for name in sorted(now.keys() & was.keys()):
            if now[name] == was[name]:
                continue
            if name not in HARMLESS:
                raise ValueError(
                    f"{run.folder} was made with {flag_of(name)} {was[name]}, and now it is {now[name]}: runs of one "
                    "comparison must not differ in it; name another --output_dir, or move that run away"
                )
            harmless[name] = f"{flag_of(name)} is now {now[name]}; it was {was[name]} in {run.folder}"
    for line in harmless.values():
        _logger.info("%s", line)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a `config.yaml`; parsed once as long as the file stays, as tables are written after every run.

    Raises:
        ValueError: it is damaged, or of no run.
    """
    state = path.stat()
    return {**_parse_config(path, state.st_mtime_ns, state.st_size)}


@cache
def _parse_config(path: Path, _written: int, _size: int) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        missing = {"pe", "join_type", "seed", "epochs"} - options.keys()
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: move its folder away") from error
    if missing:
        raise ValueError(f"{path} is of no run of main.py: it lacks {', '.join(sorted(missing))}; move it away")
    return options


def count_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
