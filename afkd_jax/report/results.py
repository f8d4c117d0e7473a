"""The runs under a directory, sorted into arms and seeds: what a report is made from."""

import dataclasses
import functools
import json
import pathlib
import statistics
from typing import Any

import numpy as np

from afkd_jax import config as config_lib
from afkd_jax import studies
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.workdir import State
from afkd_jax.report import jsonl, predictions
from afkd_jax.report.console import log
from afkd_jax.studies import Study

# What a report needs to know of every run, and of a finished one.
_CONFIG = {'batch_size', 'dataset', 'epochs', 'method', 'networks', 'seed'}
_SUMMARY = {
    'ensemble', 'fingerprint', 'images', 'images_per_s', 'networks', 'steps', 'wall_s',
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One run.

    Attributes:
      arm: label.
      seed: of the run.
      folder: of the run, relative to the directory of the report.
      state: of the run.
      config: flat, as config.json has it; {} if it has not begun.
      summary: of a finished run; else None.
    """

    root: pathlib.Path
    arm: str
    seed: int
    folder: pathlib.PurePath
    state: State
    config: dict[str, Any]
    summary: dict[str, Any] | None

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; [] if there is none."""
        try:
            return jsonl.read(self.root / self.folder / 'metrics.jsonl')
        except OSError:
            return []

    @functools.cached_property
    def outputs(self) -> dict[str, np.ndarray] | None:
        """What predictions.read returns, of a finished run."""
        columns = len(self.summary['networks']) + 1 if self.summary else 0
        return predictions.read(self.root / self.folder, columns) if columns else None

    @property
    def predictions(self) -> dict[str, np.ndarray] | None:
        """The outputs of the networks that learn alone."""
        found = self.outputs
        if found is None or not self.summary:
            return None
        learn = [k for k, n in enumerate(self.summary['networks']) if not n.get('frozen')]
        return found | {name: found[name][:, learn] for name in ('predicted', 'confidence')}

    @property
    def error(self) -> str:
        """Why the run failed, or cannot be used."""
        try:
            return json.loads((self.root / self.folder / workdir_lib.FAILED).read_text())['error']
        except (OSError, ValueError, KeyError, TypeError):
            return 'its config.json or summary.json is damaged'

    def networks(self, key: str) -> list[float]:
        """Returns a value of each network in the summary, those that learn; [] without values."""
        networks = self.summary['networks'] if self.summary else []
        values = [network.get(key) for network in networks if not network.get('frozen')]
        return values if values and None not in values else []

    def mean(self, key: str = 'test_accuracy') -> float | None:
        """Returns the mean of the networks' values: the outcome of a run is that of accuracies."""
        values = self.networks(key)
        return statistics.fmean(values) if values else None

    def training_s(self, speed: float | None) -> float | None:
        """Returns the seconds of the training steps at this speed, in images per second."""
        if not (self.summary and speed):
            return None
        return self.summary['steps'] * self.config['batch_size'] / speed

    @property
    def speed(self) -> float | None:
        """The training speed, in images per second, without compilation and evaluation."""
        return self.summary['images_per_s'] if self.summary else None

    def evaluations(self, split: str) -> list[dict[str, Any]]:
        """Returns the evaluation lines of a split, in order of steps."""
        found = {
            line['step']: line
            for line in self.lines
            if line['kind'] == 'evaluation' and line.get('split') == split
        }
        return [found[step] for step in sorted(found)]


@dataclasses.dataclass(frozen=True)
class Results:
    """The runs of a report.

    Attributes:
      study: what they are to show; made up for runs that nobody planned as a study.
      runs: of every arm and seed of it.
    """

    root: pathlib.Path
    study: Study
    runs: list[Result]

    def of(self, arm: str) -> list[Result]:
        """Returns the finished runs of an arm."""
        return [run for run in self.runs if run.arm == arm and run.summary]

    def outcomes(self, arm: str) -> dict[int, float]:
        """Returns seed -> mean of the networks' test accuracies at the last epoch, percent."""
        found = {run.seed: run.mean() for run in self.of(arm)}
        return {seed: value for seed, value in found.items() if value is not None}


def collect(root: pathlib.Path) -> Results:
    """Returns the runs under a directory.

    Those of a study that has not begun are among them; without a study.json, arms are the runs
    whose configs differ in the seed alone, and `vanilla` is the baseline if there is one.

    Args:
      root: of a study, or a directory with runs at any depth.

    Raises:
      UserError: study.json cannot be read.
    """
    if study := studies.read(root):
        runs = [
            _read(root, arm, seed, pathlib.PurePath(studies.slug(arm), f'seed={seed}'))
            for arm in study.arms
            for seed in study.seeds
        ]
        return Results(root, study, runs)
    folders = [
        path.parent.relative_to(root)
        for path in sorted(root.rglob('config.json'))
        if 'set_aside' not in path.parts
    ]
    runs = [_read(root, '', 0, folder) for folder in folders]
    runs = [run for run in runs if run.config.keys() >= _CONFIG]
    labels = _labels([run.config for run in runs])
    runs = [
        dataclasses.replace(run, arm=label, seed=run.config['seed'])
        for run, label in zip(runs, labels, strict=True)
    ]
    runs = _distinct(runs)
    arms = dict.fromkeys(labels)
    baseline = next((label for label in arms if label.startswith('vanilla')), '')
    seeds = sorted({run.seed for run in runs})
    study = Study(root.name, '', {arm: {} for arm in arms}, seeds, baseline)
    return Results(root, study, runs)


def _read(root: pathlib.Path, arm: str, seed: int, folder: pathlib.PurePath) -> Result:
    path = root / folder
    try:
        config = config_lib.completed(json.loads((path / 'config.json').read_text()))
    except (OSError, ValueError, AttributeError):
        config = {}
    summary, state = workdir_lib.finished_summary(path), workdir_lib.state_of(path)
    if summary and not (config.keys() >= _CONFIG and summary.keys() >= _SUMMARY):
        log(f'warning: {path}: config.json or summary.json is damaged; the run is left out')
        summary, state = None, State.FAILED
    return Result(root, arm, seed, folder, state, config, summary)


def _distinct(runs: list[Result]) -> list[Result]:
    """Returns one run of each arm and seed, a finished one if there is; a copy must not count."""
    found: dict[tuple[str, int], Result] = {}
    for run in sorted(runs, key=lambda run: run.summary is None):
        first = found.setdefault((run.arm, run.seed), run)
        if first is not run:
            log(f'warning: {run.folder}: left out, because its config is that of {first.folder}')
    return [run for run in runs if found[run.arm, run.seed] is run]


def _labels(configs: list[dict[str, Any]]) -> list[str]:
    """Returns a label of each config, of the fields in which they differ, but for the seed."""
    names = [
        name
        for name in config_lib.DEFAULTS
        if name not in ('seed', 'method')
        and config_lib.defines_run(name)
        and len({json.dumps(config.get(name)) for config in configs}) > 1
    ]
    return [
        studies.label({name: config.get(name) for name in ('method', *names)}) for config in configs
    ]
