"""Trackers: what receives a run's events while it trains.

`JsonLines` (metrics.jsonl) and `Terminal` are always on. `config.trackers` names others, built-in
(tensorboard) or your own; see docs/extending.md.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afkd_jax.config import Config
from afkd_jax.errors import UserError, typed_line
from afkd_jax.method.metrics import Evaluation
from afkd_jax.registry import TRACKERS

Means = dict[str, list[float] | float]  # name -> one value, or one per network


@dataclasses.dataclass(frozen=True)
class Start:
    """A new run, or one that resumes at `step`: events of later steps come again.

    Attributes:
      last_step: of the whole run.
      names: of the networks.
      epoch_ended: False: an epoch may end at `step`, and its evaluations and EpochEnd come again.
    """

    step: int
    last_step: int
    names: tuple[str, ...]
    config: Config
    devices: str
    epoch_ended: bool


@dataclasses.dataclass(frozen=True)
class TrainValues:
    """Means over the steps since the last such event.

    Attributes:
      epoch: passes completed, with fraction.
      images_per_s: None if no step was timed.
      skipped: steps that are not in the means.
    """

    step: int
    epoch: float
    means: Means
    images_per_s: float | None
    skipped: int


@dataclasses.dataclass(frozen=True)
class EvaluationValues:
    """One split's evaluation, at the end of an epoch."""

    step: int
    epoch: int
    split: str
    evaluation: Evaluation


@dataclasses.dataclass(frozen=True)
class Warned:
    """A warning."""

    step: int
    text: str


@dataclasses.dataclass(frozen=True)
class EpochEnd:
    """The end of an epoch, after its evaluations: means over all its steps, as in TrainValues."""

    step: int
    epoch: int
    means: Means
    images_per_s: float | None
    skipped: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of the run, after its results are on disk.

    Attributes:
      summary: as in summary.json.
      curves: the file; None if it could not be drawn.
    """

    step: int
    summary: dict[str, Any]
    curves: pathlib.Path | None


Event = Start | TrainValues | EvaluationValues | Warned | EpochEnd | Finished


class Tracker(contextlib.ExitStack):
    """Receives events, and is a context that ends with the run."""

    def handle(self, event: Event) -> None:
        """Takes an event; unknown ones are ignored."""

    def sync(self) -> None:
        """Returns when all events so far are on disk."""


def create(config: Config, workdir: pathlib.Path) -> dict[str, Tracker]:
    """Returns the trackers that the config names.

    Raises:
      UserError: there is no such tracker, or it cannot be made.
    """
    made: dict[str, Tracker] = {}
    try:
        for name in config.trackers:
            made[name] = _create(name, config, workdir)
    except UserError:
        Trackers(made).close()
        raise
    return made


def _create(name: str, config: Config, workdir: pathlib.Path) -> Tracker:
    factory = TRACKERS.get(name)
    try:
        return factory(config, workdir)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'config.trackers: "{name}" cannot be used ({typed_line(error)}); '
            'mend it, or leave it out'
        ) from error


class Trackers(Tracker):
    """Forwards to several trackers, in order.

    Args:
      optional: by name; one that fails is closed and left out from then on, with a warning.

    Attributes:
      required: they come first, are entered elsewhere, and their errors end the run.
    """

    def __init__(self, optional: Mapping[str, Tracker]):
        super().__init__()
        self.required: Sequence[Tracker] = ()
        self._optional, self._step = dict(optional), 0
        for name, tracker in optional.items():
            self.callback(self._attempt, name, tracker.close)

    def handle(self, event: Event) -> None:
        """See Tracker."""
        self._step = event.step
        for tracker in self.required:
            tracker.handle(event)
        for name, tracker in list(self._optional.items()):
            self._attempt(name, lambda tracker=tracker: tracker.handle(event))

    def sync(self) -> None:
        """See Tracker."""
        for tracker in self.required:
            tracker.sync()
        for name, tracker in list(self._optional.items()):
            self._attempt(name, tracker.sync)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        if name not in self._optional:
            return
        try:
            action()
        except Exception as error:
            failed = self._optional.pop(name)
            with contextlib.suppress(Exception):
                failed.close()
            text = f'tracker "{name}" failed ({typed_line(error)}); the run continues without it'
            self.handle(Warned(self._step, text))
