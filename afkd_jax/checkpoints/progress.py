"""What a run must remember beside its arrays; stored with each checkpoint, as JSON."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """What a run must remember beside its state.

    Attributes:
      best: per network and, last, the ensemble: {'validation', 'test', 'step'}, accuracies in
        percent where the validation accuracy was highest (the first such epoch); None before.
      scores: split -> its last evaluation: {'step', 'accuracy', 'cross_entropy', 'top5'}, as
        in summary.Scores.
      evaluated: the step after which the last epoch was evaluated; 0: none yet.
      images_per_s: training speed of each epoch so far, without each process's first step.
      wall_s: seconds spent up to this checkpoint, over all restarts.
      skipped: steps skipped because of a number that was not finite, up to the last log line.
      skipped_in_a_row: those since the last log line that had a step that was not skipped.
      saturated: per network, for how many steps its discriminator has been saturated.
      warned: per network, whether that was told.
    """

    best: list[dict | None]
    saturated: list[int]
    warned: list[bool]
    scores: dict[str, dict] = dataclasses.field(default_factory=dict)
    evaluated: int = 0
    images_per_s: list[float] = dataclasses.field(default_factory=list)
    wall_s: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def start(cls, networks: int) -> 'Progress':
        """Returns the progress before the first step of a run of K = `networks`."""
        return cls(
            best=[None] * (networks + 1), saturated=[0] * networks, warned=[False] * networks
        )

    def improved(self, validation: list[float]) -> list[int]:
        """Returns whose validation accuracy is higher than ever before; ties keep the first."""
        return [
            k
            for k, best in enumerate(self.best)
            if best is None or validation[k] > best['validation']
        ]

    def best_steps(self) -> set[int]:
        """Returns the steps at which a network or the ensemble was best on validation."""
        return {best['step'] for best in self.best if best}
