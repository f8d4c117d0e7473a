"""The console: lines for the user, from the primary process or from any."""

import os
import sys
from typing import Any

import rich.console

from afkd_jax.devices import processes


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Lets training continue when its output is no longer read, as after `| head -1`."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, markup=False, soft_wrap=True)  # quiet unless primary


def log(line: Any) -> None:
    """Prints a line, or a table, of the primary process."""
    console.print(line)


def log_from_any(line: str) -> None:
    """Prints a line about this process's machine, whichever process it is."""
    if console.quiet:
        print(f'process {processes.index()}: {line}', file=sys.stderr, flush=True)
    else:
        console.print(line)
