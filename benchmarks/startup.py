"""How long a user waits: the import of the plugin next to timm's own, and `python main.py` to its first step.

python -m benchmarks.startup [--repeats N]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.timing import Timings, alternate, describe_machine
from runtime.logs import start_logging
from runtime.tables import print_table

ROOT = Path(__file__).resolve().parent.parent
# The whole data set but a few images is one step.
RUN = ("--data-set", "DIGITS", "--batch-size", "1400", "--epochs", "1", "--device", "cpu")


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run_to_first_step() -> float:
    """Seconds until the first line of progress of a run that is then stopped."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "main.py", *RUN, "--output_dir", folder]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("epoch 1/1"):
                    seconds = time.perf_counter() - start
                    process.kill()
                    return seconds
    raise RuntimeError("main.py ended before its first step")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="of each (default: 7)")
    return parser


def main() -> None:
    args = command_line().parse_args()
    cpu = torch.device("cpu")
    names = ["import timm", "import models_lape"]
    timms, ours = alternate([lambda name=name: run("-c", name) for name in names], args.repeats, cpu)  # type: ignore[misc]
    whole = Timings([run_to_first_step() for _ in range(args.repeats)])
    first_step = f"python main.py {' '.join(RUN)}, to the first step"
    of_timms = ("1", str(ours.ratio_to(timms)), f"{whole.median / timms.median:.1f}")
    rows = [
        {"what": what, "time": f"{sample.median:.2f} s", "time / import timm's": ratio}
        for what, sample, ratio in zip((*names, first_step), (timms, ours, whole), of_timms, strict=True)
    ]
    print_table(start_logging(is_main=True), f"start; {describe_machine(cpu)}", rows, ("what",))


if __name__ == "__main__":
    main()
