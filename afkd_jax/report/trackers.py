"""Trackers: what receives a run's values while it trains.

`JsonLines` (metrics.jsonl) is always on; `Terminal` prints; `Trackers` forwards to several.
"""

import dataclasses
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from afkd_jax.config import Config
from afkd_jax.method.metrics import Evaluation


@dataclasses.dataclass(frozen=True)
class Header:
    """What the following values come from: a new run, or one that resumes at `step`."""

    step: int
    config: Config
    devices: str


@dataclasses.dataclass(frozen=True)
class TrainValues:
    """Means over the steps since the last such values.

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
    """One split's evaluation, of the networks and the ensemble."""

    step: int
    epoch: float
    split: str
    evaluation: Evaluation


class Tracker:
    """The interface; every method does nothing by default. A context that ends with the run."""

    def __enter__(self) -> 'Tracker':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the tracker."""

    def header(self, header: Header) -> None:
        """Takes what the following values come from."""

    def train(self, values: TrainValues) -> None:
        """Takes training values, once per log line."""

    def evaluation(self, values: EvaluationValues) -> None:
        """Takes an evaluation, once per epoch and split."""

    def warning(self, step: int, text: str) -> None:
        """Takes a warning."""

    def epoch(self, epoch: int) -> None:
        """Takes the end of an epoch, after its values, evaluations and checkpoint."""

    def sync(self) -> None:
        """Returns when all values so far are on disk."""


class Trackers(Tracker):
    """Forwards to several trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = tuple(trackers)

    def __enter__(self) -> 'Trackers':
        for tracker in self._trackers:
            tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for tracker in reversed(self._trackers):
            tracker.__exit__(*error)

    def header(self, header: Header) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.header(header)

    def train(self, values: TrainValues) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.train(values)

    def evaluation(self, values: EvaluationValues) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.evaluation(values)

    def warning(self, step: int, text: str) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.warning(step, text)

    def epoch(self, epoch: int) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.epoch(epoch)

    def sync(self) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.sync()
