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
from afkd_jax.report.trackers import EvaluationValues, Header, Tracker, TrainValues
from afkd_jax.report.versions import git_commit, versions


class JsonLines(Tracker):
    """Writes metrics.jsonl.

    Args:
      workdir: exists.
      names: of the networks.
      step: at which this process starts. Later lines, which a killed process left, are set aside:
        they will be written again.
      evaluated: step of the last evaluation up to there; likewise.
    """

    def __init__(self, workdir: pathlib.Path, names: tuple[str, ...], step: int, evaluated: int):
        path = workdir / 'metrics.jsonl'
        self._resumes = path.exists()
        if self._resumes:
            _set_later_lines_aside(path, step, evaluated)
        self._names, self._file = names, path.open('ab', buffering=0)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, kind: str, **values: Any) -> None:
        # Unbuffered, so that a line that does not fit on the disk is not tried again.
        line = (json.dumps({'kind': kind, **values}, allow_nan=False) + '\n').encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f'{self._file.name}: cannot be written ({error.strerror}); the checkpoints are '
                'intact: make room, or mend the disk, then the same command continues'
            ) from error

    def header(self, header: Header) -> None:
        """Writes kind 'run', or 'resume' after a stop."""
        self._write(
            'resume' if self._resumes else 'run',
            step=header.step,
            time=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
            config=header.config.to_dict(),
            versions=versions(),
            devices=header.devices,
            commit=git_commit(),
        )

    def train(self, values: TrainValues) -> None:
        """Writes kind 'train'.

        Raises:
          UserError: a value is not finite; nothing is written.
        """
        _reject_nonfinite(values.step, values.means)
        own = {name: means for name, means in values.means.items() if isinstance(means, list)}
        networks = [
            {'name': name, **{key: means[k] for key, means in own.items()}}
            for k, name in enumerate(self._names)
        ]
        self._write(
            'train',
            step=values.step,
            epoch=values.epoch,
            images_per_s=values.images_per_s,
            skipped=values.skipped,
            **{name: mean for name, mean in values.means.items() if name not in own},
            networks=networks,
        )

    def evaluation(self, values: EvaluationValues) -> None:
        """Writes kind 'evaluation'.

        Raises:
          UserError: a value is not finite; nothing is written.
        """
        evaluation = values.evaluation
        _reject_nonfinite(
            values.step, {f'cross-entropy on {values.split}': evaluation.cross_entropy}
        )
        networks: list[dict[str, Any]] = [
            {'name': name, 'accuracy': accuracy, 'cross_entropy': entropy}
            for name, accuracy, entropy in zip(
                (*self._names, 'ensemble'),
                evaluation.accuracy,
                evaluation.cross_entropy,
                strict=True,
            )
        ]
        for network, top5 in zip(networks, evaluation.top5 or (), strict=False):
            network['top5_accuracy'] = top5
        self._write(
            'evaluation',
            step=values.step,
            epoch=values.epoch,
            split=values.split,
            networks=networks,
        )

    def warning(self, step: int, text: str) -> None:
        """Writes kind 'warning'."""
        self._write('warning', step=step, text=text)

    def sync(self) -> None:
        """See Tracker."""
        os.fsync(self._file.fileno())


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


def _set_later_lines_aside(path: pathlib.Path, step: int, evaluated: int) -> None:
    """Moves lines of later steps, and damaged ones, to set_aside/metrics.jsonl."""
    kept, aside, damaged = [], [], 0
    for text in path.read_bytes().splitlines(keepends=True):
        line = _parse(text)
        if line and line['step'] <= (evaluated if line['kind'] == 'evaluation' else step):
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


def _reject_nonfinite(step: int, values: dict[str, list[float] | float]) -> None:
    for name, value in values.items():
        for k, one in enumerate(value if isinstance(value, list) else [value]):
            if not math.isfinite(one):
                whose = f' of network {k + 1}' if isinstance(value, list) else ''
                raise UserError(
                    f'step {step}: {name}{whose} is {one}; the run has diverged and is ended (what '
                    'checkpoints it has stay): lower config.logit.learning_rate, in a new --workdir'
                )
