"""The terminal: a line per epoch, and below them a bar; without a terminal, a line a minute."""

import textwrap
import time

import rich.progress

from afkd_jax.report.console import bar, console
from afkd_jax.report.trackers import (
    EpochEnd,
    EvaluationValues,
    Event,
    Means,
    Start,
    Tracker,
    TrainValues,
    Warned,
)

_SPLITS = {'validation': 'val', 'test': 'test'}  # as in the table of the results
_QUIET_S = 60.0  # without a terminal, at most one line within an epoch in so many seconds


class Terminal(Tracker):
    """Shows progress, speed, losses and accuracies."""

    def handle(self, event: Event) -> None:
        """See Tracker."""
        match event:
            case Start():
                self._start(event)
            case TrainValues(step=step):
                self._advance(step, event)
            case EvaluationValues(split=split, evaluation=evaluation) if split in _SPLITS:
                *own, ensemble = (f'{value:.2f}' for value in evaluation.accuracy)
                self._accuracies = f'{_SPLITS[split]} % {" ".join(own)} ensemble {ensemble}'
            case Warned(step, text):
                console.print(f'warning: step {step}: {text}')
            case EpochEnd():
                parts = [
                    f'epoch {event.epoch}/{self._epochs}',
                    f'{time.monotonic() - self._started:.0f} s',
                    _speed(event.images_per_s),
                    f'loss {" ".join(_losses(event.means))}',
                    self._accuracies,
                ]
                self._print(parts)
                self._accuracies = ''

    def _start(self, start: Start) -> None:
        self._epochs, self._steps = start.config.epochs, start.last_step
        self._started = self._printed = time.monotonic()
        self._accuracies, self._bar = '', None
        if console.is_interactive:
            text = rich.progress.TextColumn
            self._bar = bar(
                text('epoch {task.fields[epoch]}/' + str(self._epochs)),
                rich.progress.BarColumn(bar_width=None),
                text('{task.completed}/{task.total}'),
                text('{task.fields[values]}'),
                rich.progress.TimeRemainingColumn(),
                text('left'),
                expand=True,
            )
            self._task = self.enter_context(self._bar).add_task(
                '', total=start.last_step, completed=start.step, epoch='-', values=''
            )

    def _advance(self, step: int, event: TrainValues) -> None:
        speed, losses = _speed(event.images_per_s), event.means['cross_entropy']
        assert isinstance(losses, list)
        if self._bar:  # the mean of the losses, so that any number of networks fits
            values = f'{speed} loss {sum(losses) / len(losses):.3f}'
            epoch = f'{event.epoch:.1f}'
            self._bar.update(self._task, completed=step, epoch=epoch, values=values)
        elif time.monotonic() - self._printed >= _QUIET_S:
            epoch, loss = f'epoch {event.epoch:.2f}/{self._epochs}', ' '.join(_losses(event.means))
            self._print([epoch, f'step {step}/{self._steps}', speed, f'loss {loss}'])

    def _print(self, parts: list[str]) -> None:
        width = console.width if console.is_interactive else None
        console.print('\n'.join(lines(parts, width)))
        self._printed = time.monotonic()


def lines(parts: list[str], width: int | None) -> list[str]:
    """Returns the parts in lines of at most this width; None: in one line.

    A line ends between two parts; a part that is longer by itself, as of many networks, is wrapped.
    """
    rows: list[str] = []
    for part in filter(None, parts):
        if rows and (width is None or len(rows[-1]) + 2 + len(part) <= width):
            rows[-1] += f'  {part}'
        else:
            rows.append(f'  {part}' if rows else part)
    if width is None:
        return rows
    return [line for row in rows for line in textwrap.wrap(row, width, subsequent_indent='    ')]


def _speed(images_per_s: float | None) -> str:
    return '-' if images_per_s is None else f'{images_per_s:.0f} img/s'


def _losses(means: Means) -> list[str]:
    """Returns the cross-entropy of each network; '-' where all steps were skipped."""
    losses = means.get('cross_entropy', [])
    assert isinstance(losses, list)
    return [f'{loss:.3f}' for loss in losses] or ['-']
