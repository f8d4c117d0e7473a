"""The progress of a run: what is stored with each checkpoint beside its arrays, as JSON."""

import dataclasses
from typing import Any

import numpy as np

from afkd_jax.method.metrics import Evaluation, Sums


@dataclasses.dataclass(frozen=True)
class Best:
    """The first epoch with a network's highest validation accuracy; accuracies in percent."""

    step: int
    validation: float
    test: float


@dataclasses.dataclass
class EpochSums:
    """The log lines of an epoch that has not ended, added up on the host.

    A line ends where an epoch ends, so the lines of an epoch hold its steps and no others. What the
    device has summed since the last line is in the checkpoint too (Snapshot.sums), so the mean of
    an epoch does not depend on where a run was interrupted.

    Attributes:
      steps: that are in the totals.
      totals: name -> sum, or one per network.
      images: whose time was measured, in `seconds` of training.
    """

    steps: int = 0
    skipped: int = 0
    totals: dict[str, list[float] | float] = dataclasses.field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0

    def add(self, sums: Sums) -> None:
        """Adds the fetched sums of a log line."""
        self.steps += int(sums.steps)
        self.skipped += int(sums.skipped)
        for name, total in sums.totals.items():
            before = np.asarray(self.totals.get(name, 0.0))  # in double precision
            self.totals[name] = (before + total).tolist()

    def add_time(self, images: int, seconds: float) -> None:
        """Adds the time of some steps."""
        self.images += images
        self.seconds += seconds

    @property
    def empty(self) -> bool:
        """Whether there was no line: the epoch before has ended completely."""
        return not (self.steps or self.skipped)

    @property
    def means(self) -> dict[str, list[float] | float]:
        """Name -> mean over the steps; nothing if all were skipped."""
        if not self.steps:
            return {}
        return {
            name: (np.asarray(total) / self.steps).tolist() for name, total in self.totals.items()
        }

    @property
    def images_per_s(self) -> float | None:
        """Images per second of training; None if no step was timed."""
        return self.images / self.seconds if self.images else None


@dataclasses.dataclass
class Progress:
    """What a run must remember beside its arrays.

    Attributes:
      best: per network and, last, the ensemble; None before the first evaluation.
      saturated: per network, for how many steps its discriminator has been saturated.
      warned: per network, whether that was reported.
      evaluations: split -> (step, its last evaluation, without counts and outputs).
      evaluated: the step after which the last epoch was evaluated; 0: none yet.
      epoch: the log lines of the current epoch.
      images_per_s: training speed of each epoch so far, without each process's first step.
      wall_s: seconds spent up to this checkpoint, over all restarts.
      seconds: the same by what they were spent on; see clock.Spent.
      skipped: steps skipped because of a non-finite value, up to the last log line.
      extensions: where config.epochs grew (--extend): the step, and the epochs before.
      skipped_in_a_row: those since the last log line with a step that was not skipped.
    """

    best: list[Best | None]
    saturated: list[int]
    warned: list[bool]
    evaluations: dict[str, tuple[int, Evaluation]] = dataclasses.field(default_factory=dict)
    evaluated: int = 0
    epoch: EpochSums = dataclasses.field(default_factory=EpochSums)
    images_per_s: list[float] = dataclasses.field(default_factory=list)
    wall_s: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    skipped_in_a_row: int = 0
    extensions: list[dict[str, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, networks: int) -> 'Progress':
        """Returns the progress before the first step of a run of K = `networks`."""
        return cls(
            best=[None] * (networks + 1), saturated=[0] * networks, warned=[False] * networks
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'Progress':
        """Returns what to_json() was made of.

        Raises:
          TypeError, KeyError: another version wrote it.
        """
        best = [entry and Best(**entry) for entry in values['best']]
        evaluations = {
            split: (step, Evaluation(**entry))
            for split, (step, entry) in values['evaluations'].items()
        }
        epoch = EpochSums(**values.get('epoch', {}))  # not in a checkpoint of an older version
        return cls(**values | {'best': best, 'evaluations': evaluations, 'epoch': epoch})

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON; of evaluations all but counts and outputs."""
        evaluations = {
            split: (step, dataclasses.replace(evaluation, counts=None, outputs=None))
            for split, (step, evaluation) in self.evaluations.items()
        }
        return dataclasses.asdict(dataclasses.replace(self, evaluations=evaluations))

    def improved(self, validation: list[float]) -> list[int]:
        """Returns the networks whose validation accuracy is a new maximum; ties keep the first."""
        return [
            k for k, best in enumerate(self.best) if best is None or validation[k] > best.validation
        ]

    def best_steps(self) -> set[int]:
        """Returns the steps at which a network or the ensemble was best on validation."""
        return {best.step for best in self.best if best}
