"""--mode report: tables, paired comparisons and figures of the runs under a directory.

Written there: report.md with its figures in report_figures/, report.html, one file that contains
them, and results.csv, one row per run, network and split.
"""

import collections
import csv
import dataclasses
import io
import pathlib
import shlex
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import artefact
from afkd_jax.checkpoints.files import write_atomic
from afkd_jax.checkpoints.workdir import State
from afkd_jax.command import Command
from afkd_jax.errors import UserError
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.report import page, study_figures
from afkd_jax.report.console import log, print_json
from afkd_jax.report.results import Result, Results, collect
from afkd_jax.report.statistics import (
    MARGIN,
    Comparison,
    calibration,
    compare,
    crossed_bootstrap,
    holm,
)
from afkd_jax.tools import plan


def write(workdir: pathlib.Path) -> dict[str, Any]:
    """Writes the report of a directory, logs where it is, and returns the results as JSON.

    Raises:
      UserError: there are no runs in it.
    """
    if not workdir.is_dir():
        raise UserError(f'--workdir: there is no directory {workdir}')
    results = collect(workdir)
    if not results.runs:
        raise UserError(f'--workdir: {workdir} holds no runs; name a study, or a folder of runs')
    comparisons = holm(
        [
            compare(arm, against, results.outcomes(arm), results.outcomes(against))
            for arm, against in results.study.pairs()
        ]
    )
    operations = {arm: _operations(results.of(arm)) for arm in results.study.arms}
    figures = study_figures.draw(results, comparisons, operations)
    titles = {name: title for name, (title, _) in figures.items()}
    text = _markdown(results, comparisons, operations, titles)
    paths = page.write(workdir, text, {name: svg for name, (_, svg) in figures.items()})
    write_atomic(workdir / 'results.csv', _csv(results).encode())
    for comparison in comparisons:
        log(_sentence(comparison))
    log(f'written to {", ".join(map(str, paths))} and {workdir / "results.csv"}')
    return {
        'study': results.study.name,
        'runs': collections.Counter(run.state.value for run in results.runs),
        'accuracy': {arm: results.outcomes(arm) for arm in results.study.arms},
        'comparisons': [dataclasses.asdict(comparison) for comparison in comparisons],
    }


def _sentence(c: Comparison) -> str:
    if c.mean is None:
        return f'{c.arm} against {c.against}: {c.verdict}'
    interval = f', 95 % interval {_interval(c.interval)}' if c.interval else ''
    return f'{c.arm} against {c.against}: {c.mean:+.2f} points{interval}: {c.verdict}'


def _markdown(
    results: Results,
    comparisons: list[Comparison],
    operations: dict[str, float | None],
    figures: dict[str, str],
) -> str:
    study, states = results.study, [run.state for run in results.runs]
    lines = [f'# {study.name}', '']
    lines += [text + '\n' for text in (study.question, study.paper) if text]
    counts = ', '.join(f'{states.count(s)} {s.value}' for s in State if states.count(s))
    lines += [f'{len(states)} runs: {counts}. {len(study.arms)} arms, {len(study.seeds)} seeds.']
    lines += ['', *_missing(results), '## Results', '', _results_table(results, operations), '']
    lines += [
        'Accuracy in percent on the test split after the last epoch: mean and standard deviation '
        'over seeds. `best` is the mean test accuracy of the networks at their best epoch on '
        'validation; nothing is selected on test. `averages` are networks with averaged weights '
        '(`config.ema.decay`), where there are such. `operations` are those of convolutions and '
        'products in the networks (an adversary pulls back twice; discriminators are left out) and '
        f'`time` that of the training steps, relative to {study.reference}. img/s and time are '
        'medians over seeds and depend on what else the machine does. ECE and NLL are of the '
        'networks, on test.',
        '',
    ]
    if comparisons:
        lines += ['## Comparisons', '']
        lines += [f'- {_sentence(c)}' for c in comparisons]
        lines += ['', _comparison_table(results, comparisons), '']
        lines += [
            'The unit is the seed, the outcome the mean of the networks at the last epoch, in '
            'points. `95 %` is the t interval of the mean difference, `BCa` the bootstrap interval '
            '(unreliable below about 8 seeds), `p` the exact two-sided sign-flip test (at least '
            '2 / 2^n), `Holm` that p over all comparisons. `images` resamples seeds and test '
            'images: it covers the choice of the test images too. A verdict needs Holm below '
            f'0.05; "no difference" needs a 90 % interval within {MARGIN} points.',
            '',
        ]
    if figures:
        lines += ['## Figures', '']
    for name, title in figures.items():
        lines += [f'![{title}](report_figures/{name}.svg)', '', f'{title}.', '']
    lines += ['## Provenance', '', *_provenance(results)]
    return '\n'.join(lines) + '\n'


def _missing(results: Results) -> Iterator[str]:
    left = [run for run in results.runs if run.state is not State.DONE]
    for run in left:
        if run.state is State.FAILED:
            yield f'- failed: {run.arm}, seed {run.seed} (`{run.folder}`): {run.error}'
    found = {(run.arm, run.seed) for run in results.runs}
    gaps = [
        ('missing', arm, seed)
        for arm in results.study.arms
        for seed in results.study.seeds
        if (arm, seed) not in found
    ]
    gaps += [(r.state.value, r.arm, r.seed) for r in left if r.state is not State.FAILED]
    for what, arm in dict.fromkeys((what, arm) for what, arm, _ in gaps):
        seeds = [str(seed) for kind, label, seed in gaps if (kind, label) == (what, arm)]
        yield f'- {what}: {arm}, seed{"s" * (len(seeds) > 1)} {", ".join(seeds)}'
    yield ''


def _spread(values: list[float]) -> str:
    """Returns 'mean ± SD'."""
    if not values:
        return '-'
    sd = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.2f}{sd}'


def _results_table(results: Results, operations: dict[str, float | None]) -> str:
    baseline = results.study.reference
    speeds = {arm: _median([run.speed for run in results.of(arm)]) for arm in operations}
    # The runs of an arm have the same number of steps.
    times = {
        arm: next((run.training_s(speed) for run in results.of(arm)), None)
        for arm, speed in speeds.items()
    }
    with_averages = any(run.networks('test_ema_accuracy') for run in results.runs)
    rows = []
    for arm in results.study.arms:
        runs = results.of(arm)
        by_network = list(zip(*(run.networks('test_accuracy') for run in runs), strict=False))
        best = [run.mean('test_accuracy_at_best_validation') for run in runs]
        averages = [run.mean('test_ema_accuracy') for run in runs]
        speed = speeds[arm]
        pooled = study_figures.pooled_confidence(results, arm)
        entropies = [
            entropy
            for run in runs
            for line in run.evaluations('test')[-1:]
            for entropy in [study_figures.mean_of(line, 'cross_entropy')]
        ]
        rows.append(
            [
                arm,
                str(len(runs)),
                _spread(list(results.outcomes(arm).values())),
                ', '.join(_spread(list(values)) for values in by_network) or '-',
                _spread([run.summary['ensemble']['test_accuracy'] for run in runs if run.summary]),
                _spread([value for value in best if value is not None]),
                *([_spread([v for v in averages if v is not None])] if with_averages else []),
                f'{statistics.fmean(entropies):.3f}' if entropies else '-',
                f'{calibration(*pooled)[0]:.1f}' if pooled else '-',
                f'{speed:,.0f}' if speed else '-',
                _ratio(operations[arm], operations[baseline]),
                _ratio(times[arm], times[baseline]),
            ]
        )
    columns = ['arm', 'n', 'mean of networks', 'networks', 'ensemble', 'best']
    columns += ['averages'] if with_averages else []
    return page.table([*columns, 'NLL', 'ECE', 'img/s', 'operations', 'time'], rows)


def _ratio(value: float | None, base: float | None) -> str:
    return f'{value / base:.2f}' if value and base else '-'


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value]
    return statistics.median(known) if known else None


def _operations(runs: list[Result]) -> float | None:
    """Returns the operations of a run of an arm; None if its networks are not known here."""
    if not runs:
        return None
    path = runs[0].root / runs[0].folder
    try:
        config, info = artefact.read_config(path), artefact.read_images(path).info
        cohort = cohort_lib.assemble(config, info.image_shape, info.num_classes, info.train)
    except UserError:
        return None
    return float(plan.image_flops(cohort)) * info.train * config.epochs


def _interval(interval: tuple[float, float] | None) -> str:
    return f'{interval[0]:+.2f} .. {interval[1]:+.2f}' if interval else '-'


def _comparison_table(results: Results, comparisons: list[Comparison]) -> str:
    rows = [
        [
            f'{c.arm} - {c.against}',
            str(len(c.differences)),
            f'{c.mean:+.2f}' if c.mean is not None else '-',
            _interval(c.interval),
            _interval(c.bca),
            _interval(_by_image(results, c)),
            f'{c.p:.3f}' if c.p is not None else '-',
            f'{c.p_holm:.3f}' if c.p_holm is not None else '-',
            f'{c.wins} / {c.ties} / {c.losses}',
        ]
        for c in comparisons
    ]
    columns = ['arm - against', 'n', 'mean', '95 %', 'BCa', 'images', 'p', 'Holm']
    return page.table([*columns, 'wins / ties / losses'], rows)


def _by_image(results: Results, c: Comparison) -> tuple[float, float] | None:
    """Returns the crossed bootstrap interval; None without predictions of two seeds."""

    def accuracy_N(run: Result) -> Any:
        if (found := run.predictions) is None:
            return None
        return 100.0 * (found['predicted'] == found['label'][:, None]).mean(1)

    mine, theirs = (
        {run.seed: accuracy_N(run) for run in results.of(arm)} for arm in (c.arm, c.against)
    )
    rows = [
        mine[seed] - theirs[seed]
        for seed in sorted(mine.keys() & theirs.keys())
        if mine[seed] is not None
        and theirs[seed] is not None
        and len(mine[seed]) == len(theirs[seed])
    ]
    return crossed_bootstrap(np.stack(rows)) if len(rows) > 1 else None


def command_of(config: dict[str, Any]) -> str:
    """Returns the command that trains a run: the defaults and every field that differs from them.

    Args:
      config: flat, as config.json has it.
    """
    fields = []
    for name, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if value != config_lib.DEFAULTS.get(name):
            fields.append(shlex.quote(f'--config.{name}={value}'))
    return ' '.join(['python launch.py --config configs/default.py', *fields])


def _provenance(results: Results) -> Iterator[str]:
    yield 'The arms, as fields that differ from the config of the study:'
    yield ''
    for arm, fields in results.study.arms.items():
        words = ', '.join(f'`{name} = {value}`' for name, value in fields.items())
        yield f'- {arm}: {words or "none"}'
    yield ''
    for name in ('dataset', 'networks', 'epochs', 'batch_size'):
        values = dict.fromkeys(str(run.config[name]) for run in results.runs if run.config)
        yield f'- {name}: {"; ".join(values)}'
    facts = [
        {
            'images': ', '.join(
                f'{run.summary["images"][split]} {split}'
                for split in ('train', 'validation', 'test')
            )
            if run.summary
            else 'unknown',
            'devices': line['devices'],
            'commit': line['commit'] or 'unknown',
            **{f'{name}': version for name, version in line['versions'].items()},
        }
        for run in results.runs
        for line in run.lines
        if line['kind'] in ('run', 'resume') and 'devices' in line
    ]
    for name in dict.fromkeys(name for each in facts for name in each):
        values = dict.fromkeys(str(each.get(name)) for each in facts)
        yield f'- {name}: {"; ".join(values)}'
    yield ''
    rows = [
        [
            run.arm,
            str(run.seed),
            f'{run.mean():.2f}' if run.mean() is not None else '-',
            f'`{run.summary["fingerprint"][:16]}`',
            f'`{command_of(run.config)}`',
        ]
        for run in results.runs
        if run.summary
    ]
    columns = ['arm', 'seed', 'accuracy', 'fingerprint', 'command']
    yield page.table(columns, rows, 'command')


def _csv(results: Results) -> str:
    file = io.StringIO()
    columns = [
        'arm', 'seed', 'folder', 'state', 'network', 'name', 'split', 'accuracy', 'top5_accuracy',
        'cross_entropy', 'ece', 'test_accuracy_at_best_validation', 'images_per_s', 'wall_s',
        'fingerprint',
    ]  # fmt: skip
    out = csv.DictWriter(file, columns, restval='', lineterminator='\n')
    out.writeheader()
    for run in results.runs:
        base = {'arm': run.arm, 'seed': run.seed, 'folder': run.folder, 'state': run.state.value}
        if not run.summary:
            out.writerow(base)
            continue
        base |= {name: run.summary[name] for name in ('images_per_s', 'wall_s', 'fingerprint')}
        entries, found = [*run.summary['networks'], run.summary['ensemble']], run.outputs
        for split in ('validation', 'test'):
            for line in run.evaluations(split)[-1:]:
                for k, (network, entry) in enumerate(zip(line['networks'], entries, strict=True)):
                    best = entry['test_accuracy_at_best_validation'] if split == 'test' else None
                    out.writerow(
                        base
                        | {name: value for name, value in network.items() if name in columns}
                        | {
                            'network': k + 1 if entry is not entries[-1] else 'ensemble',
                            'split': split,
                            'ece': _ece(found, k) if found and split == 'test' else '',
                            'test_accuracy_at_best_validation': '' if best is None else best,
                        }
                    )
    return file.getvalue()


def _ece(outputs: dict[str, np.ndarray], k: int) -> float:
    right = outputs['predicted'][:, k] == outputs['label']
    return calibration(outputs['confidence'][:, k].astype(float), right)[0]


def main(command: Command, _: object) -> int:
    """Writes the report; returns the exit code."""
    print_json(write(command.workdir))
    return 0
