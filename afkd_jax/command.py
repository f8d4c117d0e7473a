"""A command: the mode, its options and the checked config. Imports no JAX."""

import dataclasses
import pathlib

from afkd_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags beside the config; see launch.py for their meaning."""

    mode: str
    workdir: str | None
    step: int | None
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    topology: str | None
    largest_batch: bool
    sweep: str | None
    debug: bool


@dataclasses.dataclass(frozen=True)
class Command:
    """What the entry function of a mode gets.

    Attributes:
      workdir: of the run; exists only if a run has begun.
    """

    config: Config
    options: Options
    workdir: pathlib.Path
