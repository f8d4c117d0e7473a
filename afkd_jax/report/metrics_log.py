"""Host side of the metrics: the workdir's files, log lines, and the progress bar on a terminal."""

import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import rich.console
import rich.progress

from afkd_jax.checkpoints.workdir import write_whole
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.report.summary import Scores

_PACKAGES = (
    *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'),
    *('scikit-learn', 'tensorflow-datasets'),
)


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Lets training go on when nobody reads its words any more, as after `| head -1`."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell_all(words: str) -> None:
    """Tells the reader what concerns the machine of this process, whichever it is."""
    if console.quiet:
        print(f'process {processes.index()}: {words}', file=sys.stderr, flush=True)
    else:
        console.print(words)


console = _Console(highlight=False, markup=False, soft_wrap=True)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {'python': platform.python_version(), **packages}


def _git_commit() -> str | None:
    """Returns the commit of this code, with '+' if files differ from it; None outside git."""
    folder = pathlib.Path(__file__).parent

    def git(*words):
        run = ['git', '-C', str(folder), *words]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def _refuse_non_finite(step: int, values: dict[str, list[float] | float]) -> None:
    for name, value in values.items():
        for k, one in enumerate(value if isinstance(value, list) else [value]):
            if not math.isfinite(one):
                whose = f' of network {k + 1}' if isinstance(value, list) else ''
                raise UserError(
                    f'step {step}: {name}{whose} is {one}; the run has diverged and is ended (what '
                    'checkpoints it has stay): lower config.logit.learning_rate, in a new --workdir'
                )


def _cut(path: pathlib.Path, start: int, evaluated: int) -> None:
    """Moves lines about later steps, and what is no line, to set_aside/metrics.jsonl."""

    def belongs(text: bytes) -> bool:
        if not is_line(text):
            return False
        line = json.loads(text)
        return line['step'] <= (evaluated if line['kind'] == 'evaluation' else start)

    def is_line(text: bytes) -> bool:
        try:
            line = json.loads(text)
            return text.endswith(b'\n') and isinstance(line['step'], int) and 'kind' in line
        except (ValueError, KeyError, TypeError):  # cut, or altered
            return False

    lines = path.read_bytes().splitlines(keepends=True)
    past = [line for line in lines if not belongs(line)]
    broken = sum(not is_line(line) for line in lines if line.endswith(b'\n'))
    if broken:  # not by a kill: that cuts only the last one
        console.print(f'warning: {path}: {broken} lines were damaged; they are set aside')
    if past:
        aside = path.parent / 'set_aside' / path.name
        aside.parent.mkdir(exist_ok=True)
        with aside.open('ab') as file:  # first there, then no longer here
            file.writelines(line.rstrip(b'\n') + b'\n' for line in past)
            os.fsync(file.fileno())
        write_whole(path, b''.join(line for line in lines if belongs(line)))


class Writer:
    """Writes metrics.jsonl, one line of text per epoch, and on a terminal a progress bar.

    Args:
      workdir: exists; None: nothing is written, as by a process that does not lead.
      names: of the networks.
      start: step at which this process starts. Lines of metrics.jsonl about later steps, which a
        killed process left, are set aside: they will be written again.
      evaluated: step of the last evaluation up to there; likewise.
      steps: of the whole run.
      epochs: of the whole run.
    """

    def __init__(
        self,
        workdir: pathlib.Path | None,
        names: tuple[str, ...],
        start: int,
        evaluated: int,
        steps: int,
        epochs: int,
    ):
        self._file, self._resumes = None, False
        if workdir:
            path = workdir / 'metrics.jsonl'
            self._resumes = path.exists()
            if self._resumes:
                _cut(path, start, evaluated)
            self._file = path.open('ab', buffering=0)
        self._names, self._epochs = names, epochs
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
                '', total=steps, completed=start, epoch=0, rate='-', accuracies=''
            )

    def __enter__(self) -> 'Writer':
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()

    def _line(self, kind: str, **values: Any) -> None:
        if not self._file:
            return
        # Unbuffered, so that a line that did not fit on the disk is not tried again.
        line = (json.dumps({'kind': kind, **values}, allow_nan=False) + '\n').encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f'{self._file.name}: cannot be written ({error.strerror}); the checkpoints are '
                'intact: make room, or mend the disk, then the same command continues'
            ) from error

    def header(self, config: Any, device: str, step: int) -> None:
        """Writes what the following lines come from; kind 'run', or 'resume' after a stop."""
        self._line(
            'resume' if self._resumes else 'run',
            step=step,
            time=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
            config=config.to_dict(),
            versions=versions(),
            devices=device,
            commit=_git_commit(),
        )

    def train(
        self,
        step: int,
        epoch: float,
        means: dict[str, list[float] | float],
        images_per_s: float,
        skipped: int,
    ) -> None:
        """Writes the means since the last such line: of the step, and an entry per network.

        `skipped` steps are not in the means.

        Raises:
          UserError: a value is not a finite number; nothing is written.
        """
        _refuse_non_finite(step, means)
        own = {name: values for name, values in means.items() if isinstance(values, list)}
        networks = [
            {'name': name, **{key: values[k] for key, values in own.items()}}
            for k, name in enumerate(self._names)
        ]
        self._line(
            'train',
            step=step,
            epoch=epoch,
            images_per_s=images_per_s,
            skipped=skipped,
            **{name: value for name, value in means.items() if name not in own},
            networks=networks,
        )
        self._rate = images_per_s
        entropies = ' '.join(f'{value:.3f}' for value in means['cross_entropy'])
        self._losses = f'train cross-entropy {entropies}'
        if self._bar:
            self._bar.update(
                self._task, completed=step, epoch=f'{epoch:.1f}', rate=f'{images_per_s:.0f}'
            )

    def evaluation(self, step: int, epoch: float, split: str, scores: Scores) -> None:
        """Writes one split's scores: those of the networks and of the ensemble.

        Raises:
          UserError: a value is not a finite number; nothing is written.
        """
        _refuse_non_finite(step, {f'cross-entropy on {split}': scores.cross_entropy})
        networks = [
            {'name': name, 'accuracy': accuracy, 'cross_entropy': entropy}
            for name, accuracy, entropy in zip(
                (*self._names, 'ensemble'), scores.accuracy, scores.cross_entropy, strict=True
            )
        ]
        for network, top5 in zip(networks, scores.top5 or (), strict=False):
            network['top5_accuracy'] = top5
        self._line('evaluation', step=step, epoch=epoch, split=split, networks=networks)
        *own, ensemble = (f'{value:.2f}' for value in scores.accuracy)
        self._accuracies = f'{split} % {" ".join(own)} ensemble {ensemble}'

    def warning(self, step: int, text: str) -> None:
        """Writes a warning, and tells it to the reader."""
        self._line('warning', step=step, text=text)
        console.print(f'warning: step {step}: {text}')

    def sync(self) -> None:
        """Returns when all lines are on the disk, whatever happens to the machine."""
        if self._file:
            os.fsync(self._file.fileno())

    def epoch(self, epoch: int) -> None:
        """Tells the terminal or the log how far the run is."""
        if self._bar:
            self._bar.update(self._task, accuracies=self._accuracies)
            return
        seconds = time.time() - self._started
        console.print(
            f'epoch {epoch}/{self._epochs}  {seconds:.0f} s  {self._rate:.0f} img/s  '
            f'{self._losses}  {self._accuracies}'
        )
