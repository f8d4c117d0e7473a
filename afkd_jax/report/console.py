"""The console: lines for the user, from the primary process or from any."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import rich.console

from afkd_jax.devices import processes


class _Console(rich.console.Console):
    needs_reader = True  # False: the mode continues when nobody reads its output any more

    def on_broken_pipe(self) -> None:
        """Discards the output from here on, or raises the BrokenPipeError that is handled."""
        if self.needs_reader:
            raise  # rich calls this where it has caught the error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, markup=False, soft_wrap=True)  # quiet unless primary


@contextlib.contextmanager
def redirected(path: pathlib.Path) -> Iterator[None]:
    """Appends what is printed inside to a file."""
    before: Any = None if console.file is sys.stdout else console.file
    with path.open('a', encoding='utf-8') as file:
        console.file = file
        try:
            yield
        finally:
            console.file = before


def log(line: Any) -> None:
    """Prints a line, or a table, of the primary process."""
    console.print(line)


def log_from_any(line: str) -> None:
    """Prints a line about this process's machine, whichever process it is."""
    if console.quiet:
        with contextlib.suppress(BrokenPipeError):
            print(f'process {processes.index()}: {line}', file=sys.stderr, flush=True)
    else:
        console.print(line)
