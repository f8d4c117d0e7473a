"""Host side of the metrics: the workdir's files, log lines, and the progress bar on a terminal."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from typing import Any

import numpy as np
import rich.console
import rich.progress

from afkd_jax import config as config_lib
from afkd_jax.errors import UserError
from afkd_jax.summary import Scores

_PACKAGES = (
    *('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'),
    *('scikit-learn', 'tensorflow-datasets'),
)

console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)


def claim(workdir: pathlib.Path, config: Any) -> None:
    """Makes the workdir and its config.json, or checks that it is the same run's.

    Raises:
      UserError: the workdir belongs to another config, or cannot be made.
    """
    path = workdir / 'config.json'
    ours = json.loads(json.dumps(config.to_dict()))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if (workdir / 'checkpoints').exists():
                raise ValueError('it has checkpoints, but no config.json to tell whose')
            write_json(path, ours)
            return
        theirs = json.loads(path.read_text())
        if not isinstance(theirs, dict):
            raise ValueError('its config.json is not an object')
    except (OSError, ValueError) as error:
        raise UserError(
            f'--workdir: {workdir} cannot be used ({error}); name another directory'
        ) from None
    different = config_lib.differences(config_lib.flatten(theirs), config_lib.flatten(ours))
    if different:
        raise UserError(
            f'--workdir: {workdir} holds a run with another config ({"; ".join(different)}); '
            'name another directory, or use the old config to continue that run'
        )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(path)


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
    for name in sorted(values, key=lambda name: name != 'cross_entropy'):
        if not np.isfinite(values[name]).all():
            raise UserError(
                f'step {step}: {name} is {values[name]}; the run has diverged and is ended (what '
                'checkpoints it has stay): lower config.logit.learning_rate, in a new --workdir'
            )


class Writer:
    """Writes metrics.jsonl, one line of text per epoch, and on a terminal a progress bar.

    Args:
      workdir: exists.
      names: of the networks.
      start: step at which this process starts.
      steps: of the whole run.
      epochs: of the whole run.
    """

    def __init__(
        self, workdir: pathlib.Path, names: tuple[str, ...], start: int, steps: int, epochs: int
    ):
        self._file = (workdir / 'metrics.jsonl').open('a+')
        self._end_cut_line()
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
        self._file.close()

    def _end_cut_line(self) -> None:
        """Ends a last line that a killed process left without its end, so that none is glued on."""
        self._file.seek(0)
        text = self._file.read()
        if text and not text.endswith('\n'):
            self._file.write('\n')

    def _line(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({'kind': kind, **values}, allow_nan=False) + '\n')
        self._file.flush()

    def header(self, config: Any, device: str, step: int) -> None:
        """Writes what the following lines come from; kind 'run', or 'resume' after a stop."""
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        self._line(
            'resume' if self._file.tell() else 'run',
            step=step,
            time=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
            config=config.to_dict(),
            python=platform.python_version(),
            versions=versions,
            devices=device,
            commit=_git_commit(),
        )

    def train(
        self,
        step: int,
        epoch: float,
        means: dict[str, list[float] | float],
        images_per_s: float,
    ) -> None:
        """Writes the means since the last such line: of the step, and an entry per network.

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
        self._line('evaluation', step=step, epoch=epoch, split=split, networks=networks)
        *own, ensemble = (f'{value:.2f}' for value in scores.accuracy)
        self._accuracies = f'{split} % {" ".join(own)} ensemble {ensemble}'

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
