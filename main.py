"""Train a vision transformer, or evaluate a checkpoint of one.

`python main.py --help` lists the options; `torchrun main.py` does the same work in several processes.
"""

from training.interrupt import end_on_ctrl_c, raise_on_ctrl_c

if __name__ == "__main__":  # before the imports below, which take seconds
    end_on_ctrl_c("main.py")

import json
import math
import sys
import time
from collections.abc import Sequence
from logging import getLogger
from typing import Any

import torch
from torch import nn

from engine import evaluate, train_one_epoch
from model_setup import count_parameters
from run_setup import Run, Training, set_up
from training import distributed
from training.checkpoint import atomic_write, save_checkpoint
from training.curves import draw_curves
from training.distributed import World
from training.files import CHECKPOINTS, last_checkpoint, write_text
from training.images import UnreadableImageError
from training.interrupt import Interrupted, defer_interrupts
from training.logs import LoopDisplay, clock, end_in_one_line, start_logging
from training.shards import DamagedShardError
from training.state import Progress

_logger = getLogger(__name__)

SECONDS_BETWEEN_DRAWINGS = 30
SECONDS_FOR_OTHERS = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process).

    Returns:
        The exit code: 0; 1 if the training diverged, or a file could not be written; 2 for bad input; if a signal ended
        the run, 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1. All but 0 come with one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    world = distributed.world_from_environment()
    console = start_logging(world.is_main)
    display = LoopDisplay(console if world.is_main else None, world.size)
    try:
        try:
            run = set_up(argv, world, display)
        except (ValueError, OSError) as error:
            return _end(f"error: {error}", 2, world)
        with defer_interrupts():
            return evaluate_checkpoint(run) if run.training is None else train(run, run.training)
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


def evaluate_checkpoint(run: Run) -> int:
    """Evaluate the model, show the result, and write `eval.json`."""
    result = evaluate_model(run, run.model, "test")
    _logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", result["acc1"], result["acc5"], result["loss"])
    if run.output_dir is not None:
        write_text(run.output_dir / "eval.json", json.dumps(result) + "\n")
    return 0


def train(run: Run, training: Training) -> int:
    """Train the epochs that are left; after each, evaluate, log and save."""
    args, state = run.args, training.state
    if state.epoch >= args.epochs:
        _logger.info("all %d epochs of %s are done: give more --epochs to go on", args.epochs, args.resume)
        return 0
    start, epochs_before, drawn = time.monotonic(), state.epoch, -math.inf
    try:
        while state.epoch < args.epochs:
            row = run_epoch(run, training)
            is_best = row["test_acc1"] > state.best_acc1
            state.best_acc1 = max(state.best_acc1, row["test_acc1"])
            ema_is_best = row.get("test_ema_acc1", -1.0) > state.best_ema_acc1
            state.best_ema_acc1 = max(state.best_ema_acc1, row.get("test_ema_acc1", -1.0))
            state.epoch = row["epoch"]
            state.progress = Progress(bad_in_a_row=state.progress.bad_in_a_row)
            training.loader.num_skipped = 0
            state.accuracies.append(row["test_acc1"])
            state.scheduler.step(state.epoch, row["test_acc1"])
            state.rows.append(row)
            left = (time.monotonic() - start) / (state.epoch - epochs_before) * (args.epochs - state.epoch)
            _logger.info("%s  best %.2f %%  %s left", summarise(row, args.epochs), state.best_acc1, clock(left))
            if training.events is not None:
                training.events.add(row, state.epoch)
            draws = state.epoch == args.epochs or time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS
            save(run, training, CHECKPOINTS[1:2] * is_best + CHECKPOINTS[2:] * ema_is_best, draws)
            if draws:
                drawn = time.monotonic()
    except FloatingPointError as error:
        raise FloatingPointError(f"epoch {state.epoch + 1}: {error}; {last_checkpoint(run.output_dir)}") from error
    except Interrupted as interrupt:
        save(run, training)
        distributed.wait_for_all()  # torchrun ends all processes soon after the first of them has ended
        place = f" in epoch {state.epoch + 1}, after update {state.progress.step} of {training.updates}"
        raise Interrupted(interrupt.signal_number, f"{place}; {last_checkpoint(run.output_dir)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f" in epoch {state.epoch + 1}; {last_checkpoint(run.output_dir)}") from None
    finally:
        if training.events is not None:
            training.events.close()
    if training.unsaved:
        raise OSError(f"{training.unsaved}; {last_checkpoint(run.output_dir)}")
    return 0


def run_epoch(run: Run, training: Training) -> dict[str, Any]:
    """Train for one epoch, and evaluate: a row of `log.txt`."""
    args, state, loader = run.args, training.state, training.loader
    start = time.monotonic()
    epoch = state.epoch + 1
    accuracy = f"  acc@1 {state.rows[-1]['test_acc1']:.2f} %" if state.rows else ""
    done = state.progress.step * args.accum_steps * args.batch_size
    loader.set_epoch(state.epoch, done)
    if state.mixup is not None and args.mixup_off_epoch is not None:
        state.mixup.mixup_enabled = state.epoch < args.mixup_off_epoch
    if training.events is not None:
        training.events.begin_epoch(state.progress)

    def after_update() -> None:
        if training.events is not None:
            training.events.after_update(state.epoch, state.progress, state.optimizer.param_groups[0]["lr"])
        every = args.checkpoint_steps
        if every and state.progress.step % every == 0 and state.progress.step < training.updates:
            save(run, training)

    trained = train_one_epoch(
        training.model,
        loader,
        state.criterion,
        state.optimizer,
        state.scheduler,
        state.scaler,
        progress=state.progress,
        epoch=state.epoch,
        title=f"epoch {epoch}/{args.epochs}{accuracy}",
        world=run.world,
        device=run.device,
        amp_dtype=getattr(torch, args.amp_dtype),
        seed=args.seed,
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        max_bad_steps=args.max_bad_steps,
        train_mode=args.train_mode,
        mixup=state.mixup,
        ema=state.ema,
        display=run.display,
        after_update=after_update,
    )
    num_bad_images = distributed.sum_over_ranks(torch.tensor(loader.num_skipped, device=run.device)).item()
    row = {"epoch": epoch, "train_loss": trained["loss"], "train_lr": trained["lr"]}
    row |= {"skipped_steps": state.progress.skipped, "skipped_images": num_bad_images}
    tested = {"test": evaluate_model(run, run.model, f"epoch {epoch}/{args.epochs}  test")}
    if state.ema is not None:
        average = state.ema.module.to(run.device)
        tested["test_ema"] = evaluate_model(run, average, f"epoch {epoch}/{args.epochs}  test of the average")
        average.to(state.ema.device or run.device)
    for name, result in tested.items():
        row |= {f"{name}_{key}": result[key] for key in ("loss", "acc1", "acc5")}
    row |= {"n_parameters": count_parameters(run.model), "seconds": time.monotonic() - start}
    return row | {key: trained[key] for key in ("images_per_second", "waiting_share")}


def evaluate_model(run: Run, model: nn.Module, title: str) -> dict[str, float]:
    """Evaluate `model` on the test images."""
    times = 1 if run.args.dist_eval else run.world.size
    result = evaluate(
        model,
        run.test_loader,
        num_images=times * run.num_test_images,
        title=title,
        device=run.device,
        amp_dtype=getattr(torch, run.args.amp_dtype),
        display=run.display,
    )
    return {**result, "count": run.num_test_images}


def summarise(row: dict[str, Any], epochs: int) -> str:
    """A row of `log.txt` for the eye."""
    ema = f" (average {row['test_ema_acc1']:.2f} %)" if "test_ema_acc1" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
        f"acc@1 {row['test_acc1']:.2f} %{ema}  acc@5 {row['test_acc5']:.2f} %  lr {row['train_lr']:.2e}  "
        f"{row['seconds']:.1f} s, {100 * row['waiting_share']:.0f} % waiting for data"
    )


# ---- files


def save(run: Run, training: Training, best: Sequence[str] = (), draws: bool = False) -> None:
    """Write the log, then the checkpoint: a row beyond the checkpoint is dropped when the run is resumed.

    All processes have to call this; the main one writes. Where it cannot, the files stay as they were, and the run goes
    on: there may be space again when it saves next.

    Args:
        best: names of the checkpoints that this one replaces as the best so far.
        draws: whether to draw the curves, too.
    """
    state, folder = training.state, run.output_dir
    sums = [state.progress.loss_sum.item(), training.loader.num_skipped]
    progress = {
        "counts": state.progress.counts(),
        "updates": training.updates,
        "sums_by_rank": distributed.gather_over_ranks(sums, run.world, run.device),
    }
    if folder is None:
        return
    model = run.model.state_dict()
    if not all(weight.isfinite().all() for weight in model.values()):
        training.unsaved = "the checkpoint is not saved, as the weights are not finite"
        _logger.error("%s", training.unsaved)
        return
    checkpoint = {
        "model": model,
        **state.state_dict(),
        "progress": progress,
        "config": training.config,
        "description": run.description,
    }
    try:
        write_text(folder / "log.txt", "".join(f"{json.dumps(row)}\n" for row in state.rows))
        for name in (CHECKPOINTS[0], *best):
            save_checkpoint(folder / name, checkpoint)
        if draws:
            with atomic_write(folder / "curves.png") as file:
                draw_curves(state.rows, file, "{model}, {pe}, {join_type} on {data_set}".format(**run.description))
    except OSError as error:
        training.unsaved = f"the checkpoint of {folder} could not be saved, and the one before stays: {error}"
        _logger.error("%s", training.unsaved)
    else:
        training.unsaved = ""


if __name__ == "__main__":
    raise_on_ctrl_c()
    sys.exit(main())
