"""How long a user waits: for an import, for a command's answer and first line, and for the first step of a run.

python -m benchmarks.startup [--repeats N]
"""

from benchmarks.options import startup_parser
from runtime.startup import start_command

if __name__ == "__main__":  # before the imports below, which take seconds
    start_command("python -m benchmarks.startup", startup_parser().parse_args)

import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timing import alternate, describe_machine
from runtime.interrupt import raise_on_ctrl_c
from runtime.logs import start_logging
from runtime.tables import print_table

ROOT = Path(__file__).resolve().parent.parent
TIMM = "import timm; timm.create_model('deit_tiny_patch16_224')"
RUN = ("main.py", "--data-set", "DIGITS", "--device", "cpu")
FIRST_STEP = rb"epoch 1/20 .* [1-9]\d*/11"
COMMANDS = ("main.py", "compare.py", "similarity_visualize.py", "-m benchmarks.models")


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=False)


def run_until(pattern: bytes, command: Sequence[str]) -> None:
    """Run a command on a terminal until it shows something like that, and stop it.

    Raises:
        RuntimeError: it did not.
    """
    ours, its = pty.openpty()
    shown = b""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        try:
            while not re.search(pattern, shown):
                shown += os.read(ours, 1024)
        except OSError as error:  # the other end is closed
            raise RuntimeError(f"{' '.join(command)} ended before it showed {pattern!r}") from error
        finally:
            process.kill()
            os.close(ours)


def main() -> None:
    args = startup_parser().parse_args()
    cpu = torch.device("cpu")
    calls = {
        TIMM: lambda: run("-c", TIMM),
        "import models_lape": lambda: run("-c", "import models_lape"),
        f"python {' '.join(RUN)}, to its first line": lambda: run_until(b".", RUN),
        "the same, to the first step": lambda: run_until(FIRST_STEP, RUN),
    }
    for command in COMMANDS:
        calls[f"python {command} --help"] = lambda command=command: run(*command.split(), "--help")  # type: ignore[misc]
        calls[f"python {command} --wrong-flag"] = lambda command=command: run(*command.split(), "--wrong-flag")  # type: ignore[misc]
    timings = dict(zip(calls, alternate(list(calls.values()), args.repeats, cpu), strict=True))
    with_model = timings[TIMM]
    rows = [
        {
            "what": what,
            "median": f"{timing.median:.2f} s",
            "least": f"{min(timing.seconds):.2f} s",
            "time / timm's, with a model": str(timing.ratio_to(with_model)),
        }
        for what, timing in timings.items()
    ]
    print_table(start_logging(is_main=True), f"start; {describe_machine(cpu)}", rows, ("what",))


if __name__ == "__main__":
    raise_on_ctrl_c()
    main()
