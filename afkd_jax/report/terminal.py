"""The terminal: a progress bar, or one line per epoch where the output is not a terminal."""

import time

import rich.progress

from afkd_jax.report.console import console
from afkd_jax.report.trackers import (
    EpochEnd,
    EvaluationValues,
    Event,
    Tracker,
    TrainValues,
    Warned,
)


class Terminal(Tracker):
    """Shows progress, speed, losses and accuracies.

    Args:
      step: at which this process starts.
      steps: of the whole run.
      epochs: of the whole run.
    """

    def __init__(self, step: int, steps: int, epochs: int):
        super().__init__()
        self._epochs, self._started = epochs, time.time()
        self._rate = self._losses = self._accuracies = ''
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
            self._task = self.enter_context(self._bar).add_task(
                '', total=steps, completed=step, epoch=0, rate='-', accuracies=''
            )

    def handle(self, event: Event) -> None:
        """See Tracker."""
        match event:
            case TrainValues(step, epoch, means, speed):
                losses = means['cross_entropy']
                assert isinstance(losses, list)
                self._rate = f'{speed:.0f}'
                self._losses = ' '.join(f'{value:.3f}' for value in losses)
                if self._bar:
                    self._bar.update(
                        self._task, completed=step, epoch=f'{epoch:.1f}', rate=self._rate
                    )
            case EvaluationValues(split=split, evaluation=evaluation):
                *own, ensemble = (f'{value:.2f}' for value in evaluation.accuracy)
                self._accuracies = f'{split} % {" ".join(own)} ensemble {ensemble}'
            case Warned(step, text):
                console.print(f'warning: step {step}: {text}')
            case EpochEnd() if self._bar:
                self._bar.update(self._task, accuracies=self._accuracies)
            case EpochEnd(epoch):
                seconds = time.time() - self._started
                console.print(
                    f'epoch {epoch}/{self._epochs}  {seconds:.0f} s  {self._rate} img/s  '
                    f'train cross-entropy {self._losses}  {self._accuracies}'.rstrip()
                )
                self._accuracies = ''  # an epoch may have no evaluation of its own
