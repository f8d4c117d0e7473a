"""Trackers: what receives a run's events while it trains.

`JsonLines` (metrics.jsonl) is always on; `Terminal` prints.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

from afkd_jax.config import Config
from afkd_jax.method.metrics import Evaluation


@dataclasses.dataclass(frozen=True)
class Start:
    """A new run, or one that resumes at `step`."""

    step: int
    config: Config
    devices: str


@dataclasses.dataclass(frozen=True)
class TrainValues:
    """Means over the steps since the last such event.

    Attributes:
      epoch: passes completed, with fraction.
      means: name -> one value, or one per network.
      skipped: steps that are not in the means.
    """

    step: int
    epoch: float
    means: dict[str, list[float] | float]
    images_per_s: float
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
    """The end of an epoch, after its values, evaluations and checkpoint."""

    epoch: int


Event = Start | TrainValues | EvaluationValues | Warned | EpochEnd


class Tracker(contextlib.ExitStack):
    """Receives events, and is a context that ends with the run."""

    def handle(self, event: Event) -> None:
        """Takes an event; unknown ones are ignored."""

    def sync(self) -> None:
        """Returns when all events so far are on disk."""


class Trackers(Tracker):
    """Forwards to several trackers, in order; they are entered elsewhere."""

    def __init__(self, trackers: Sequence[Tracker]):
        super().__init__()
        self._trackers = trackers

    def handle(self, event: Event) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.handle(event)

    def sync(self) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.sync()
