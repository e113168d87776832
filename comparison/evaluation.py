"""Evaluations of one model, one after the other in this process, as `compare.py` starts it.

Each argument is a JSON list: a title, and the words of a command line of `main.py --eval`. What one cannot evaluate is
told in one line, and the next one is evaluated.
"""

import json
import sys
from collections.abc import Sequence

from runtime.interrupt import Interrupted, defer_interrupts
from runtime.logs import LoopDisplay, end_in_one_line, start_logging
from runtime.world import World
from training.evaluation import evaluate_checkpoint
from training.setup import set_up

PROGRAM = "main.py"


def main(arguments: Sequence[str]) -> int:
    """Evaluate all.

    Returns:
        The exit code: 0; 2 if something was wrong with one; as `main.py` has it after a signal.
    """
    display, code = LoopDisplay(start_logging(is_main=True)), 0
    for title, argv in map(json.loads, arguments):
        try:
            setup = set_up(argv, World(), display)
            with defer_interrupts():
                evaluate_checkpoint(setup)
        except (ValueError, OSError) as error:
            code = end_in_one_line(PROGRAM, f"error: {title}: {error}", 2)
        except Interrupted as interrupt:
            return end_in_one_line(PROGRAM, str(interrupt), interrupt.exit_code)
        except KeyboardInterrupt:
            return end_in_one_line(PROGRAM, "interrupted", 130)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
