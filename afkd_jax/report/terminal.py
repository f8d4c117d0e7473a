"""The terminal: a progress bar, or one line per epoch where the output is not a terminal."""

import time

import rich.progress

from afkd_jax.report.console import console
from afkd_jax.report.trackers import EvaluationValues, Tracker, TrainValues


class Terminal(Tracker):
    """Shows progress, speed, losses and accuracies.

    Args:
      step: at which this process starts.
      steps: of the whole run.
      epochs: of the whole run.
    """

    def __init__(self, step: int, steps: int, epochs: int):
        self._epochs = epochs
        self._started, self._rate, self._losses, self._accuracies = time.time(), 0.0, '', ''
        self._bar = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn('epoch {task.fields[epoch]}/' + str(epochs)),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn('{task.fields[rate]} img/s, left'),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn('{task.fields[accuracies]}'),
                console=console,
            )
            self._task = self._bar.add_task(
                '', total=steps, completed=step, epoch=0, rate='-', accuracies=''
            )

    def __enter__(self) -> 'Terminal':
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def train(self, values: TrainValues) -> None:
        """See Tracker."""
        self._rate, entropies = values.images_per_s, values.means['cross_entropy']
        assert isinstance(entropies, list)
        self._losses = f'train cross-entropy {" ".join(f"{value:.3f}" for value in entropies)}'
        if self._bar:
            self._bar.update(
                self._task,
                completed=values.step,
                epoch=f'{values.epoch:.1f}',
                rate=f'{self._rate:.0f}',
            )

    def evaluation(self, values: EvaluationValues) -> None:
        """See Tracker."""
        *own, ensemble = (f'{value:.2f}' for value in values.evaluation.accuracy)
        self._accuracies = f'{values.split} % {" ".join(own)} ensemble {ensemble}'

    def warning(self, step: int, text: str) -> None:
        """See Tracker."""
        console.print(f'warning: step {step}: {text}')

    def epoch(self, epoch: int) -> None:
        """See Tracker."""
        if self._bar:
            self._bar.update(self._task, accuracies=self._accuracies)
            return
        seconds = time.time() - self._started
        console.print(
            f'epoch {epoch}/{self._epochs}  {seconds:.0f} s  {self._rate:.0f} img/s  '
            f'{self._losses}  {self._accuracies}'
        )
