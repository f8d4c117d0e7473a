"""The console: lines for the user, from the primary process or from any, and signs of life."""

import contextlib
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress

_SILENT_S = 3.0  # elsewhere than on a terminal, work that is silent for longer is announced

_LEAST, _NO_LIMIT = 80, 10_000  # columns: of tables on a terminal, and in files


class _Console(rich.console.Console):
    needs_reader = True  # False: the mode continues when nobody reads its output any more
    least = 0  # columns, even where the terminal has fewer
    said = 0.0  # when the last line was printed
    silent_s = 0.0  # of work since then

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        """The size of the terminal; COLUMNS=0 means that it is not known."""
        columns, lines = super().size
        return rich.console.ConsoleDimensions(max(columns or _LEAST, self.least), lines)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints a line."""
        self.said, self.silent_s = time.monotonic(), 0.0
        super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Discards the output from here on, or raises the BrokenPipeError that is handled."""
        if self.needs_reader:
            raise  # rich calls this where it has caught the error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# Quiet unless primary.
console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def redirected(path: pathlib.Path) -> Iterator[None]:
    """Appends what is printed inside to a file."""
    before: Any = None if console.file in (sys.stdout, sys.stderr) else console.file
    interactive = console.is_interactive
    with path.open('a', encoding='utf-8', errors='backslashreplace') as file:
        console.file, console.is_interactive = file, False
        try:
            yield
        finally:
            console.file, console.is_interactive = before, interactive


def log(line: Any) -> None:
    """Prints a line, or a table, of the primary process; a narrow terminal cuts no number of it."""
    console.least = _LEAST if console.is_terminal else _NO_LIMIT
    try:
        console.print(line)
    finally:
        console.least = 0


def log_from_any(line: str) -> None:
    """Prints a line about this process's machine, whichever process it is."""
    if console.quiet:
        from afkd_jax.devices import processes  # here, because it imports JAX

        with contextlib.suppress(BrokenPipeError):
            print(f'process {processes.index()}: {line}', file=sys.stderr, flush=True)
    else:
        console.print(line)


def keep_stdout_for_json() -> None:
    """Makes the console print on stderr, and print_json on stdout: --json."""
    console.stderr = True
    console.is_interactive = console.is_terminal and not console.is_dumb_terminal


def print_json(result: Any) -> None:
    """Prints the result of a mode as one line of JSON on stdout, with --json only."""
    if console.stderr and not console.quiet:
        print(json.dumps(result, allow_nan=False), flush=True)


def bar(*columns: Any, expand: bool = False) -> rich.progress.Progress:
    """Returns a moving line at the bottom of the terminal; what is printed appears above it."""
    return rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        *columns,
        console=console,
        transient=True,
        expand=expand,
        # Nothing prints by itself meanwhile, and what does stays on the stream that it chose.
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextlib.contextmanager
def working(on: str) -> Iterator[None]:
    """Shows what the program works on: a moving line with the seconds, only on a terminal.

    Elsewhere a plain line appears once work, also of several kinds, has been silent for 3 s.

    Args:
      on: e.g. 'compiling'.
    """
    if console.is_interactive:
        with bar(rich.progress.TextColumn('{task.description} {task.elapsed:.0f} s')) as line:
            line.add_task(on, total=None)
            yield
        return
    begin = time.monotonic()
    announcement = threading.Timer(_SILENT_S - console.silent_s, log, [f'{on} ...'])
    announcement.daemon = True
    announcement.start()
    try:
        yield
    finally:
        announcement.cancel()
        console.silent_s += time.monotonic() - max(begin, console.said)
