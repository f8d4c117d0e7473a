"""A command: the mode, its options and the checked config. Imports no JAX."""

import dataclasses
import pathlib

from afkd_jax.config import Config
from afkd_jax.errors import UserError
from afkd_jax.studies import Study


def number_or(text: str | None, flag: str, least: int, *words: str) -> int | str | None:
    """Returns a flag's whole number, or one of the words; None if it is not given.

    Raises:
      UserError: it is neither.
    """
    if text is None or text in words:
        return text
    if not text.isdecimal() or len(text) > 18 or int(text) < least:
        rule = f'a whole number from {least} on' + ''.join(f", or '{word}'" for word in words)
        raise UserError(f'--{flag}: must be {rule}, but is {text!r}')
    return int(text)


def new_file(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of a file to write.

    Raises:
      UserError: it exists, so that nothing is lost; or it cannot be made there.
    """
    if path.exists() or not path.name:
        raise UserError(f'--output: {path} exists; delete it, or name another file')
    if not path.parent.is_dir():
        raise UserError(f'--output: there is no directory {path.parent}')
    return path


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags beside the config; see launch.py for their meaning."""

    mode: str
    workdir: str | None
    step: str | None  # a number, 'last' or 'best'; None: the last
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    topology: str | None
    largest_batch: bool
    sweep: str | None
    debug: bool
    json: bool = False  # only the result on stdout, as JSON
    network: str | None = None  # counted from 1, or 'ensemble'
    images: tuple[str, ...] = ()
    output: str | None = None
    format: str | None = None
    extend: bool = False
    study: str | None = None
    jobs: int | None = None
    dry_run: bool = False
    verify: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """What the entry function of a mode gets.

    Attributes:
      workdir: of the run; exists only if a run has begun.
      study: to be run in --mode study; else of the config file, if it defines one.
    """

    config: Config
    options: Options
    workdir: pathlib.Path
    study: Study | None = None
