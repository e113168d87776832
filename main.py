"""Train a vision transformer, or evaluate a checkpoint of one.

`python main.py --help` lists the options; `torchrun main.py` does the same work in several processes.
"""

from runtime.startup import start_command
from training.command_line import check_command_line, parser_of_main

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("main.py", check_command_line)

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from typing import Any

import torch
from rich.console import Console

from engine import train_one_epoch
from lape_vit.checkpoints import in_our_names
from loading.images import UnreadableImageError
from loading.shards import DamagedShardError
from runtime import distributed
from runtime.files import atomic_write, write_text
from runtime.interrupt import Interrupted, defer_interrupts, raise_on_ctrl_c
from runtime.logs import LoopDisplay, clock, end_in_one_line, start_logging
from runtime.tables import print_table
from runtime.world import World, world_from_environment
from training.checkpoint import save_checkpoint
from training.evaluation import evaluate_checkpoint, evaluate_model
from training.folder import CHECKPOINTS, last_checkpoint
from training.models import count_parameters, encoding_table
from training.options import saved_options, with_dashes
from training.setup import Setup, set_up
from training.state import Training

_logger = getLogger(__name__)

SECONDS_BETWEEN_DRAWINGS = 30
SECONDS_FOR_OTHERS = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process).

    Returns:
        The exit code: 0; 1 if the training diverged, or a file could not be written; 2 for bad input; if a signal ended
        the run, 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1, 142 for SIGALRM. All but 0 come with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    world = world_from_environment()
    console = start_logging(world.is_main)
    display = LoopDisplay(console if world.is_main else None, world.size)
    try:
        try:
            if "--list-encodings" in map(with_dashes, argv):
                return list_encodings(argv, console)
            setup = set_up(argv, world, display)
        except (ValueError, OSError) as error:
            return _end(f"error: {error}", 2, world)
        with defer_interrupts():
            if setup.training is not None:
                return train(setup, setup.training)
            evaluate_checkpoint(setup)
            return 0
    except UnreadableImageError as error:
        return _end(f"error: {error}; --skip-bad-images trains without such files", 2, world)
    except DamagedShardError as error:
        return _end(f"error: {error}", 2, world)
    except (FloatingPointError, OSError) as error:
        return _end(f"error: {error}", 1, world)
    except RuntimeError as error:
        if not distributed.is_lost_connection(error):
            raise
        time.sleep(SECONDS_FOR_OTHERS)  # where torchrun ends this process meanwhile, it names the one that failed
        return end_in_one_line("main.py", f"process {world.rank}: error: another process has ended before its time", 1)
    except Interrupted as interrupt:
        return _end(str(interrupt), interrupt.exit_code, world) if world.is_main else interrupt.exit_code
    except KeyboardInterrupt as interrupt:
        return _end(f"interrupted{interrupt}", 130, world) if world.is_main else 130
    finally:
        distributed.stop()


def _end(message: str, exit_code: int, world: World) -> int:
    if not world.is_main:
        # If the main process fails too, torchrun ends this one while it waits, and one process has told what is wrong.
        time.sleep(SECONDS_FOR_OTHERS)
        message = f"process {world.rank}: {message}"
    return end_in_one_line("main.py", message, exit_code)


def list_encodings(argv: Sequence[str], console: Console) -> int:
    """Print what each encoding is, takes and adds to the model of the command line."""
    parser = parser_of_main()
    model = {**parser.defaults, **in_our_names(parser.read(argv))}["model"]
    print_table(console, f"encodings, and the parameters that they add to {model}", *encoding_table(model))
    return 0


def train(setup: Setup, training: Training) -> int:
    """Train the epochs that are left; after each, evaluate, log and save."""
    epochs = setup.options.optimisation.epochs
    start, first, drawn, problem = time.monotonic(), training.epoch, -math.inf, ""
    if first >= epochs:
        _logger.info("all %d epochs of %s are done: give more --epochs to continue", epochs, setup.options.run.resume)
    with explained_end(setup, training):
        while training.epoch < epochs:
            epoch_start, title = time.monotonic(), f"epoch {training.epoch + 1}/{epochs}"
            training.begin_epoch()
            if setup.events is not None:
                setup.events.begin_epoch(training.progress)
            trained = train_one_epoch(training, setup.runtime, title, partial(after_update, setup, training))
            row = row_of_log(setup, training, trained, evaluate_training(setup, training, title), epoch_start)
            best = training.end_epoch(row)

            left = (time.monotonic() - start) / (training.epoch - first) * (epochs - training.epoch)
            _logger.info("%s  best %.2f %%  %s left", summarise(row, epochs), training.best_acc1, clock(left))
            if setup.events is not None:
                setup.events.add(row, training.epoch)
            draws = training.epoch == epochs or time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS
            problem = save(setup, training, best, draws)
            drawn = time.monotonic() if draws else drawn
    if problem:
        raise OSError(f"{problem}; {last_checkpoint(setup.output_dir)}")
    if setup.runtime.world.is_main:
        log_end(setup, training)
    return 0


def log_end(setup: Setup, training: Training) -> None:
    """Log the best epoch, where its checkpoint is, and what to type next."""
    _logger.info("%s", "  ".join(["best:", *best_epochs(training)]))
    folder = setup.output_dir
    if folder is None:
        _logger.info("no checkpoint, as --output_dir is not given")
        return
    checkpoint = shlex.quote(str(folder / CHECKPOINTS[1]))
    _logger.info("checkpoint: %s", checkpoint)
    _logger.info("next: python main.py --eval --resume %s", checkpoint)
    pictures = shlex.quote(str(folder / "pictures"))
    _logger.info("      python similarity_visualize.py --ckpt_path %s --save_dir %s", checkpoint, pictures)


def best_epochs(training: Training) -> list[str]:
    """The first epoch with the best test accuracy, and that of the average of the weights, if there is one."""
    names = {"test_acc1": "", "test_ema_acc1": "average of "}
    found = []
    for key, what in names.items():
        rows = [row for row in training.rows if key in row]
        if rows:
            best = max(rows, key=lambda row: row[key])
            found.append(f"{what}epoch {best['epoch']}, acc@1 {best[key]:.2f} %")
    return found


@contextmanager
def explained_end(setup: Setup, training: Training) -> Iterator[None]:
    """Let what ends the training in this context say where it ended and how to continue; save first after a signal."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"epoch {training.epoch + 1}: {error}; {last_checkpoint(setup.output_dir)}") from error
    except Interrupted as interrupt:
        save(setup, training)
        distributed.wait_for_all()  # torchrun ends all processes soon after the first of them has ended
        place = f" in epoch {training.epoch + 1}, after update {training.progress.step} of {training.updates}"
        raise Interrupted(interrupt.signal_number, f"{place}; {last_checkpoint(setup.output_dir)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f" in epoch {training.epoch + 1}; {last_checkpoint(setup.output_dir)}") from None
    finally:
        if setup.events is not None:
            setup.events.close()


def after_update(setup: Setup, training: Training) -> None:
    """Write a point for TensorBoard, and a checkpoint, if it is time for one."""
    step, every = training.progress.step, setup.options.run.checkpoint_steps
    if setup.events is not None:
        setup.events.after_update(training.epoch, training.progress, training.lr)
    if every and step % every == 0 and step < training.updates:
        save(setup, training)


def evaluate_training(setup: Setup, training: Training, title: str) -> dict[str, dict[str, float]]:
    """The results of the model as `test`, and of its average, if there is one, as `test_ema`."""
    results = {"test": evaluate_model(setup, setup.model, f"{title}  test")}
    if training.ema is not None:
        average = training.ema.module.to(setup.runtime.device)
        results["test_ema"] = evaluate_model(setup, average, f"{title}  test of the average")
        average.to(training.ema.device or setup.runtime.device)
    return results


def row_of_log(
    setup: Setup, training: Training, trained: dict[str, float], tested: dict[str, dict[str, float]], start: float
) -> dict[str, Any]:
    """A row of `log.txt`, of the epoch that began at `start`."""
    loader = training.loader
    counts = [loader.num_skipped, loader.num_taken, loader.num_made, loader.making_seconds]
    of_this_process = torch.tensor(counts, dtype=torch.float64, device=setup.runtime.device)
    skipped, taken, made, making_seconds = distributed.sum_over_ranks(of_this_process).tolist()
    row = {"epoch": training.epoch + 1, "train_loss": trained["loss"], "train_lr": trained["lr"]}
    row |= {"skipped_steps": training.progress.skipped, "skipped_images": int(skipped)}
    for name, result in tested.items():
        row |= {f"{name}_{key}": result[key] for key in ("loss", "acc1", "acc5") if key in result}
    row |= {"n_parameters": count_parameters(setup.model), "seconds": time.monotonic() - start}
    row |= {key: trained[key] for key in ("images_per_second", "waiting_share")}
    return row | {"making_seconds": making_seconds, "batches": int(taken), "batches_made": int(made)}


def summarise(row: dict[str, Any], epochs: int) -> str:
    """A row of `log.txt` for the eye."""
    top5 = f"  acc@5 {row['test_acc5']:.2f} %" if "test_acc5" in row else ""
    ema = f" (average {row['test_ema_acc1']:.2f} %)" if "test_ema_acc1" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
        f"acc@1 {row['test_acc1']:.2f} %{ema}{top5}  lr {row['train_lr']:.2e}  "
        f"{row['seconds']:.1f} s, {100 * row['waiting_share']:.0f} % waiting for data"
    )


# ---- files


def save(setup: Setup, training: Training, best: Sequence[str] = (), draws: bool = False) -> str:
    """Write the log, then the checkpoint: a row beyond the checkpoint is dropped when the run is resumed.

    All processes have to call this; the main one writes. Where it cannot, the files stay as they were, and the run
    continues: there may be space again when it saves next.

    Args:
        best: names of the checkpoints that this one replaces as the best so far.
        draws: whether to draw the curves, too.

    Returns:
        What is wrong, if it cannot be saved.
    """
    folder, runtime = setup.output_dir, setup.runtime
    sums = [training.progress.loss_sum.item(), training.loader.num_skipped]
    progress = {
        "counts": training.progress.counts(),
        "updates": training.updates,
        "sums_by_rank": distributed.gather_over_ranks(sums, runtime.world, runtime.device),
    }
    if folder is None:
        return ""
    model = setup.model.state_dict()
    if not all(weight.isfinite().all() for weight in model.values()):
        return _log_problem("the checkpoint is not saved, as the weights are not finite")
    checkpoint = {
        "model": model,
        **training.state_dict(),
        "progress": progress,
        "config": saved_options(setup.options),
        "description": setup.description,
    }
    try:
        write_text(folder / "log.txt", "".join(f"{json.dumps(row)}\n" for row in training.rows))
        for name in (CHECKPOINTS[0], *best):
            save_checkpoint(folder / name, checkpoint)
        if draws:
            from training.curves import draw_curves  # here, as matplotlib takes a second to import

            with atomic_write(folder / "curves.png") as file:
                title = "{model}, {pe}, {join_type} on {data_set}".format(**setup.description)
                draw_curves(training.rows, file, title)
    except OSError as error:
        return _log_problem(f"the checkpoint of {folder} could not be saved, and the one before stays: {error}")
    return ""


def _log_problem(problem: str) -> str:
    _logger.error("%s", problem)
    return problem


if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
