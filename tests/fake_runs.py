"""Comparisons whose runs nobody has trained: folders as `main.py` leaves them behind, and a quick stand-in for it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import compare
from comparison.plan import Plan, Run, make_plan
from training.options import config_text

MAIN = """
import json, os, signal, sys, time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
print("this is the stand-in of main.py", flush=True)
is_evaluation = sys.argv[1].startswith("[")
for argv in [json.loads(word)[1] for word in sys.argv[1:]] if is_evaluation else [sys.argv[1:]]:
    flags = {flag: value for flag, value in zip(argv, argv[1:]) if flag.startswith("--")}
    folder = Path(flags["--output-dir"])
    folder.mkdir(exist_ok=True)
    with (folder / "calls.txt").open("a") as calls:
        calls.write(json.dumps([argv, dict(os.environ), os.getpid()]) + "\\n")
    (BEHAVIOUR)
    if is_evaluation:
        (folder / "eval.json").write_text(json.dumps({"acc1": float(flags["--input-size"])}))
    if stopped and is_evaluation:
        sys.exit(143)
if is_evaluation:
    sys.exit()
log = folder / "log.txt"
rows = log.read_text().splitlines() if log.exists() else []
while len(rows) < int(flags["--epochs"]) and not stopped:
    time.sleep(0.1)
    row = {"epoch": len(rows) + 1, "test_acc1": 10.0 + len(rows), "seconds": 0.1, "images_per_second": 9.0}
    rows.append(json.dumps(row | {"waiting_share": 0.5, "n_parameters": 7}))
    (folder / "new.txt").write_text("\\n".join(rows) + "\\n")
    (folder / "new.txt").replace(log)
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        (folder / name).write_text("")
sys.exit(143 if stopped else 0)
"""
"""Learns that more epochs are better, tells how it was called, and stops when it is told to."""


def write_main(path: Path, behaviour: str = "") -> Path:
    """The stand-in, which starts with the statements of `behaviour`."""
    path.write_text(MAIN.replace("    (BEHAVIOUR)", indent(behaviour or "pass", " " * 4)))
    return path


def calls_of(folder: Path) -> list[tuple[list[str], dict[str, str], int]]:
    """Command line, environment and process of every call of the stand-in for a run."""
    path = folder / "calls.txt"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def plan_of(*argv: object) -> Plan:
    """The plan of a command line of `compare.py`."""
    return make_plan(*compare.read_options([str(word) for word in argv]))


def row(epoch: int, accuracy: float, **others: Any) -> dict[str, Any]:
    """A row of a log."""
    numbers = {"seconds": 2.0, "images_per_second": 1000.0 + epoch, "waiting_share": 0.25, "n_parameters": 1234}
    return {"epoch": epoch, "test_acc1": accuracy, **numbers, **others}


def finish(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    """Leave behind what a run does."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(config_text(run.options, "main.py"))
    (run.folder / "log.txt").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        (run.folder / name).write_bytes(b"")


def accuracies(run: Run) -> list[float]:
    """Of a made-up run: another curve for each pair and seed, the best before the last."""
    level = 50 + sum(map(ord, run.pe + run.join_type)) % 40 + run.seed
    rising = [level * epoch / (epoch + 2) for epoch in range(1, run.epochs + 1)]
    return [*rising[:-1], rising[-1] - 9.0] if run.epochs > 1 else rising


def finish_all(plan: Plan, change: Callable[[Run, list[dict[str, Any]]], None] = lambda run, rows: None) -> None:
    """Finish every run of a plan, with rows that `change` may alter."""
    for run in plan.runs:
        rows = [row(epoch, accuracy) for epoch, accuracy in enumerate(accuracies(run), start=1)]
        change(run, rows)
        finish(run, rows)
