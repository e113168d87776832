"""What ``make demo`` runs: the ordinary join and LaPE on real digits, trained, evaluated, compared and drawn."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

from runtime.logs import end_in_one_line, standard_console

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/demo")
JOINS = ("basic", "LaPE")


def run(*command: str | Path) -> None:
    """Run one of the command lines as a user would; end the demonstration with its exit code if it fails."""
    print("\n$ python", *command, flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Train, evaluate, draw and compare; what an earlier demonstration left in its folder is removed first."""
    shutil.rmtree(ROOT / RUNS, ignore_errors=True)
    table = Table()
    for column in ("join", "parameters", "accuracy (%)", "seconds"):
        table.add_column(column, justify="left" if column == "join" else "right")
    for join in JOINS:
        folder = RUNS / join
        start = time.monotonic()
        run("main.py", "--data-set", "DIGITS", "--join-type", join, "--output_dir", folder)
        seconds = time.monotonic() - start
        run("main.py", "--eval", "--resume", folder / "best_checkpoint.pth", "--output_dir", folder)
        accuracy = json.loads((ROOT / folder / "eval.json").read_text())["acc1"]
        parameters = json.loads((ROOT / folder / "log.txt").read_text().splitlines()[-1])["n_parameters"]
        table.add_row(join, f"{parameters:,}", f"{accuracy:.2f}", f"{seconds:.0f}")
    figures = RUNS / "LaPE" / "similarity"
    run("similarity_visualize.py", "--ckpt_path", RUNS / "LaPE" / "best_checkpoint.pth", "--save_dir", figures)

    console = standard_console(highlight=False, soft_wrap=True)
    console.print("\nvit_compact_patch4_32 on DIGITS, 16 patches of 4 x 4 pixels, the best epoch of each")
    console.print(table)
    console.print("training curves:    ", *(RUNS / join / "curves.png" for join in JOINS))
    console.print("checkpoints:        ", *(RUNS / join / "best_checkpoint.pth" for join in JOINS))
    console.print("position similarity:", figures / "overview.png")


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__).parse_args()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(end_in_one_line("demo.py", "interrupted", 130))
