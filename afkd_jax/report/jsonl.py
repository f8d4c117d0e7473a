"""metrics.jsonl: one JSON object per line; no step of one kind twice, also after a resume."""

import errno
import json
import math
import os
import pathlib
import time
from typing import Any

from afkd_jax.checkpoints.files import write_atomic
from afkd_jax.errors import UserError
from afkd_jax.report.console import log
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
from afkd_jax.report.versions import git_commit, versions


class JsonLines(Tracker):
    """Writes metrics.jsonl.

    Args:
      workdir: exists when the run starts.
    """

    def __init__(self, workdir: pathlib.Path):
        super().__init__()
        self._path = workdir / 'metrics.jsonl'

    def _open(self, start: Start) -> str:
        """Opens the file, without lines that will be written again; returns the kind of Start."""
        resumes = self._path.exists()
        if resumes:
            _set_later_lines_aside(self._path, start)
        self._names = start.names
        # Unbuffered, so that a line that does not fit on the disk is not tried again.
        self._file = self.enter_context(self._path.open('ab', buffering=0))
        return 'resume' if resumes else 'run'

    def _write(self, kind: str, **values: Any) -> None:
        line = (json.dumps({'kind': kind, **values}, allow_nan=False) + '\n').encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f'{self._file.name}: cannot be written ({error.strerror}); the checkpoints are '
                'intact: make room, or mend the disk, then the same command continues'
            ) from error

    def handle(self, event: Event) -> None:
        """Writes a line of kind 'run' or 'resume', 'train', 'evaluation', 'epoch' or 'warning'.

        Raises:
          UserError: a value is not finite, or the disk cannot be written; nothing is written.
        """
        match event:
            case Start():
                self._write(
                    self._open(event),
                    step=event.step,
                    time=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
                    config=event.config.to_dict(),
                    versions=versions(),
                    devices=event.devices,
                    commit=git_commit(),
                )
            case TrainValues():
                self._write_means('train', event)
            case EpochEnd():
                self._write_means('epoch', event)
            case EvaluationValues(step, epoch, split, evaluation):
                entropies = evaluation.cross_entropy
                _reject_nonfinite(step, {f'cross-entropy on {split}': entropies})
                own = {'accuracy': evaluation.accuracy, 'cross_entropy': entropies}
                own |= {'top5_accuracy': evaluation.top5} if evaluation.top5 else {}
                networks = _rows((*self._names, 'ensemble'), own)
                self._write('evaluation', step=step, epoch=epoch, split=split, networks=networks)
            case Warned(step, text):
                self._write('warning', step=step, text=text)

    def _write_means(self, kind: str, event: TrainValues | EpochEnd) -> None:
        _reject_nonfinite(event.step, event.means)
        own = {name: mean for name, mean in event.means.items() if isinstance(mean, list)}
        self._write(
            kind,
            step=event.step,
            epoch=event.epoch,
            images_per_s=event.images_per_s,
            skipped=event.skipped,
            **{name: mean for name, mean in event.means.items() if name not in own},
            networks=_rows(self._names, own),
        )

    def sync(self) -> None:
        """See Tracker."""
        os.fsync(self._file.fileno())


def _rows(names: tuple[str, ...], values: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {'name': name, **{key: value[k] for key, value in values.items()}}
        for k, name in enumerate(names)
    ]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without those that a killed process has cut."""
    parsed = map(_parse, path.read_bytes().splitlines(keepends=True))
    return [line for line in parsed if line is not None]


def _parse(text: bytes) -> dict[str, Any] | None:
    """Returns a line; None if it was cut or altered."""
    try:
        line = json.loads(text)
        whole = text.endswith(b'\n') and isinstance(line['step'], int) and 'kind' in line
    except (ValueError, KeyError, TypeError):
        return None
    return line if whole else None


def _set_later_lines_aside(path: pathlib.Path, start: Start) -> None:
    """Moves lines that a killed process left and that will be written again, and damaged ones.

    They go to set_aside/metrics.jsonl.
    """
    step = start.step
    repeated = () if start.epoch_ended else ('evaluation', 'epoch')
    kept, aside, damaged = [], [], 0
    for text in path.read_bytes().splitlines(keepends=True):
        line = _parse(text)
        if line and line['step'] <= (step - 1 if line['kind'] in repeated else step):
            kept.append(text)
        else:
            aside.append(text)
            damaged += line is None and text.endswith(b'\n')  # a kill only cuts the last line
    if damaged:
        log(f'warning: {path}: {damaged} lines were damaged; they are set aside')
    if aside:
        target = path.parent / 'set_aside' / path.name
        target.parent.mkdir(exist_ok=True)
        with target.open('ab') as file:  # written there before it is removed here
            file.writelines(text.rstrip(b'\n') + b'\n' for text in aside)
            os.fsync(file.fileno())
        write_atomic(path, b''.join(kept))


def _reject_nonfinite(step: int, values: Means) -> None:
    for name, value in values.items():
        for k, one in enumerate(value if isinstance(value, list) else [value]):
            if not math.isfinite(one):
                whose = f' of network {k + 1}' if isinstance(value, list) else ''
                raise UserError(
                    f'step {step}: {name}{whose} is {one}; the run has diverged and is ended (what '
                    'checkpoints it has stay): lower config.logit.learning_rate, in a new --workdir'
                )
