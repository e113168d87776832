"""The first second of a command, before it imports libraries that take several."""

import sys
from collections.abc import Callable, Sequence

from runtime.interrupt import end_on_ctrl_c
from runtime.logs import end_in_one_line
from runtime.world import world_from_environment


def start_command(program: str, read: Callable[[Sequence[str]], object], libraries: str = "torch and timm") -> None:
    """Answer `--help` and errors in the command line, else say which libraries are being loaded.

    To be called at the top of a command, before it imports them. Ctrl-C then ends the process in one line, until
    `raise_on_ctrl_c`. Where torchrun started several processes, the first one answers for all.

    Args:
        program: as users type it, `main.py`.
        read: reads the words of the command line without these libraries. It raises ValueError or OSError, with a
            message for the user, where they are wrong, and prints the help and raises SystemExit where they ask for it.
        libraries: for the line on standard error that says what is loading.
    """
    end_on_ctrl_c(program)
    if not world_from_environment().is_main:
        return
    try:
        read(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(end_in_one_line(program, f"error: {error}", 2))
    print(f"loading {libraries}", file=sys.stderr, flush=True)
