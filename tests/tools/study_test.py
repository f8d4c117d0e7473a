"""Studies: the grid, its workers, and the report."""

import csv
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import time

import forks
import jax
import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax import cli, studies
from afkd_jax.checkpoints import lock
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.workdir import State, state_of
from afkd_jax.command import Command, Options
from afkd_jax.config import Config
from afkd_jax.data import dataset
from afkd_jax.devices import mesh
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, UserError
from afkd_jax.report import predictions, results, study_figures
from afkd_jax.studies import Study
from afkd_jax.tools import report, study
from afkd_jax.training import loop
from afkd_jax.training import run as run_lib

BASE = {'epochs': 1, 'batch_size': 32, 'data__train_examples': 96, 'method': 'vanilla'}
WORDS = 'method=vanilla,dml;seed=0:2'


def command(workdir, words=WORDS, defined=None, **fields):
    empty = dict.fromkeys(
        ('step', 'coordinator_address', 'num_processes', 'process_id', 'topology', 'sweep')
    )
    options = Options('study', str(workdir), largest_batch=False, debug=False, study=words, **empty)
    config, workdir = tiny_config(**BASE | fields), pathlib.Path(workdir)
    planned = studies.planned(words, defined, config, workdir)
    return Command(config, options, workdir, planned)


@pytest.fixture(scope='module', autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, 'available', lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """(directory of a study of two arms and two seeds, programs that were lowered for it)."""
    workdir, lowered = tmp_path_factory.mktemp('studies') / 'one', []
    lower = run_lib.Run.lowered_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lib.Run, 'lowered_step', lambda *args: lowered.append(1) or lower(*args))
        assert study.main(command(workdir), None) == 0
    return workdir, len(lowered)


def summary(workdir, arm, seed):
    return json.loads((workdir / arm / f'seed={seed}' / 'summary.json').read_text())


def test_every_run_is_that_of_the_single_command(finished, tmp_path):
    workdir, lowered = finished
    assert lowered == 2  # one per arm: the seeds share it
    found = {
        (arm, seed): summary(workdir, arm, seed)['fingerprint']
        for arm in ('vanilla', 'dml')
        for seed in (0, 1)
    }
    assert len(set(found.values())) == 4
    run_lib._programs.clear()
    with Interrupt() as interrupt:
        config = tiny_config(**BASE | {'method': 'dml', 'seed': 1})
        alone = loop.train(config, tmp_path / 'alone', None, interrupt)
    assert alone['fingerprint'] == found['dml', 1]


def test_the_report_has_the_figures_of_the_runs(finished):
    workdir, _ = finished
    outcomes = {
        (arm, seed): statistics.fmean(
            network['test_accuracy'] for network in summary(workdir, arm, seed)['networks']
        )
        for arm in ('vanilla', 'dml')
        for seed in (0, 1)
    }
    text = (workdir / 'report.md').read_text()
    for arm in ('vanilla', 'dml'):
        values = [outcomes[arm, seed] for seed in (0, 1)]
        cell = f'{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}'
        assert f'| {arm} | 2 | {cell} |' in text
    difference = statistics.fmean(outcomes['dml', s] - outcomes['vanilla', s] for s in (0, 1))
    assert f'| dml - vanilla | 2 | {difference:+.2f} |' in text
    assert '4 runs: 4 done' in text
    with (workdir / 'results.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 2  # runs, networks with the ensemble, splits
    row = next(
        r
        for r in rows
        if (r['arm'], r['seed'], r['network'], r['split']) == ('dml', '1', '2', 'test')
    )
    expected = summary(workdir, 'dml', 1)['networks'][1]['test_accuracy']
    assert float(row['accuracy']) == pytest.approx(expected)
    found = predictions.read(workdir / 'dml' / 'seed=1', 3)
    confidence, bins = found['confidence'][:, 1].astype(float), np.linspace(0, 1, 16)
    right = found['predicted'][:, 1] == found['label']
    gaps = [
        abs(right[inside].sum() - confidence[inside].sum())
        for low, high in itertools.pairwise(bins)
        if (inside := (confidence >= low) & (confidence < high)).any()
    ]
    assert float(row['ece']) == pytest.approx(100 * sum(gaps) / len(right))
    assert all((r['ece'] == '') == (r['split'] == 'validation') for r in rows)
    page = (workdir / 'report.html').read_text()
    assert page.count('data:image/svg+xml;base64,') == text.count('](report_figures/') >= 5
    assert not re.search(r'(src|href)="(?!data:)', page)  # one file


def test_predictions_are_those_of_the_evaluation(finished):
    workdir, _ = finished
    run = results.collect(workdir).of('dml')[1]
    found = predictions.read(run.root / run.folder, 3)
    assert found['label'].shape == (359,)
    accuracy = 100 * (found['predicted'] == found['label'][:, None]).mean(0)
    entries = [*run.summary['networks'], run.summary['ensemble']]
    assert accuracy == pytest.approx([entry['test_accuracy'] for entry in entries])
    assert (found['confidence'] > 0.09).all()
    assert (found['confidence'] <= 1).all()


def test_damaged_predictions_are_left_out_with_a_warning(finished, tmp_path, capsys):
    workdir, _ = finished
    content = (workdir / 'dml' / 'seed=0' / 'predictions.npz').read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes(50) + content[middle + 50 :]
    for damaged in (b'', b'PK', content[:-100], flipped):
        (tmp_path / 'predictions.npz').write_bytes(damaged)
        assert predictions.read(tmp_path, 3) is None
        assert 'predictions.npz: cannot be read' in capsys.readouterr().out
    (tmp_path / 'predictions.npz').write_bytes(content)
    assert predictions.read(tmp_path, 4) is None
    assert predictions.read(tmp_path / 'none', 3) is None


@pytest.mark.slow
def test_a_study_can_grow_but_an_arm_cannot_change(finished, tmp_path):
    workdir, _ = finished
    before = {path: path.stat().st_mtime for path in workdir.rglob('summary.json')}
    assert study.main(command(workdir, 'method=kd_ring'), None) == 0
    assert all(path.stat().st_mtime == time for path, time in before.items())
    assert studies.read(workdir).seeds == [0, 1]
    assert state_of(workdir / 'kd_ring' / 'seed=1') is State.DONE
    other = Study('x', '', {'dml': {'method': 'dml', 'epochs': 2}}, [0])
    with pytest.raises(UserError, match='the arm "dml" is in study.json with other fields'):
        study.main(command(workdir, None, other), None)


def test_a_failed_run_is_recorded_and_tried_again(tmp_path, monkeypatch):
    train, broken = loop.train, [True]

    def fails(config, *args):
        if config.method == 'vanilla' and broken:
            raise UserError('it has diverged')
        return train(config, *args)

    monkeypatch.setattr(loop, 'train', fails)
    workdir = tmp_path / 'study'
    assert study.main(command(workdir, 'method=vanilla,dml'), None) == EXIT_USER_ERROR
    assert state_of(workdir / 'vanilla' / 'seed=0') is State.FAILED
    text = (workdir / 'report.md').read_text()
    assert '2 runs: 1 done, 1 failed' in text
    assert '- failed: vanilla, seed 0 (`vanilla/seed=0`): it has diverged' in text
    broken.clear()
    assert study.main(command(workdir, 'method=vanilla,dml'), None) == 0
    assert state_of(workdir / 'vanilla' / 'seed=0') is State.DONE


@pytest.mark.slow
def test_a_run_that_another_worker_holds_is_left_to_it(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'LEASE_S', 2.0)
    workdir = tmp_path / 'study'
    held = workdir / 'vanilla' / 'seed=0'
    held.mkdir(parents=True)
    with lock.locked(held, print):
        assert state_of(held) is State.RUNNING
        assert study.main(command(workdir, 'method=vanilla,dml'), None) == EXIT_RESUMABLE
        assert '1 done, 1 running' in (workdir / 'report.md').read_text()
    assert study.main(command(workdir, 'method=vanilla,dml'), None) == 0


@pytest.mark.slow
def test_a_signal_ends_the_worker_after_a_checkpoint(tmp_path, monkeypatch, capsys):
    train = loop.train

    def interrupted(config, workdir, step, interrupt):
        interrupt.requested = True
        return train(config, workdir, step, interrupt)

    workdir = tmp_path / 'study'
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'train', interrupted)
        assert study.main(command(workdir), None) == EXIT_RESUMABLE
    assert '4 waiting]  stopped: vanilla, seed 0' in capsys.readouterr().out
    folder = workdir / 'vanilla' / 'seed=0'
    assert state_of(folder) is State.WAITING
    (folder / 'checkpoints').mkdir()
    assert state_of(folder) is State.STOPPED
    assert study.main(command(workdir, 'method=vanilla'), None) == 0


def test_runs_that_nobody_planned_as_a_study(finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished
    folder = tmp_path / 'runs'
    for source, target in (('dml/seed=0', 'a'), ('vanilla/seed=0', 'b/c'), ('vanilla/seed=1', 'd')):
        shutil.copytree(workdir / source, folder / target)
    found = results.collect(folder)
    assert {(run.arm, run.seed) for run in found.runs} == {
        ('dml', 0), ('vanilla', 0), ('vanilla', 1)
    }  # fmt: skip
    assert found.study.baseline == 'vanilla'
    found = json.loads(json.dumps(report.write(folder)))
    assert found['runs'] == {'done': 3}
    assert found['accuracy']['vanilla'].keys() == {'0', '1'}
    assert found['comparisons'][0]['arm'] == 'dml'
    text = (folder / 'report.md').read_text()
    assert '| vanilla | 2 |' in text
    assert '| averages |' not in text

    path = folder / 'd' / 'summary.json'
    values = json.loads(path.read_text())
    for network, accuracy in zip(values['networks'], (70.0, 80.0), strict=True):
        network['test_ema_accuracy'] = accuracy
    path.write_text(json.dumps(values))

    def broken(_):
        raise ValueError('no figure')

    monkeypatch.setattr(study_figures, '_seeds', broken)
    report.write(folder)
    assert 'the figure "seeds" cannot be drawn' in capsys.readouterr().out
    text = (folder / 'report.md').read_text()
    assert 'report_figures/curves.svg' in text
    assert '| best | averages |' in text
    assert '| 75.00 |' in text
    (empty := tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no runs'):
        report.write(empty)


def test_copies_of_a_run_count_once_and_damaged_ones_not_at_all(finished, tmp_path, capsys):
    workdir, _ = finished
    folder = tmp_path / 'runs'
    for source, target in (('dml', 'a'), ('dml', 'copy of a'), ('vanilla', 'b'), ('dml', 'c')):
        shutil.copytree(workdir / source / 'seed=0', folder / target)
    (folder / 'a' / 'summary.json').unlink()
    (folder / 'c' / 'config.json').write_text('{"model": "of another program"}')
    (folder / 'b' / 'summary.json').write_text('{"finished": true}')
    found = results.collect(folder)
    assert [(str(run.folder), run.state.value) for run in found.runs] == [
        ('b', 'failed'), ('copy of a', 'done')
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert 'a: left out, because its config is that of copy of a' in out
    assert 'b: config.json or summary.json is damaged; the run is left out' in out
    assert found.runs[0].error == 'its config.json or summary.json is damaged'


def test_the_command_of_a_run_makes_its_config():
    config = tiny_config(**BASE, logit__learning_rate=0.2, ring_order=(2, 1), data__mean=(0.5,))
    flat = json.loads(json.dumps(config.to_dict()))
    words = report.command_of(results.config_lib.flatten(flat))
    fields = {}
    for word in shlex.split(words)[4:]:
        name, _, value = word.removeprefix('--config.').partition('=')
        default = results.config_lib.DEFAULTS[name]
        fields[name] = value if isinstance(default, str) else eval(value)
    assert Config().replace(**fields) == config


def test_a_study_needs_a_grid_and_a_directory_of_its_own(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(UserError, match='holds a run; name another directory for the study'):
        study.main(command(tmp_path), None)
    with pytest.raises(UserError, match='--study: name the fields'):
        study.main(command(tmp_path / 'x', None), None)


def test_a_study_is_no_directory_for_a_run(finished):
    workdir, _ = finished
    with pytest.raises(UserError, match='holds a study; name another directory'):
        workdir_lib.check(workdir, tiny_config(**BASE))


def test_dry_run_lists_the_runs_and_trains_nothing(tmp_path, capsys, monkeypatch):
    words = 'method=vanilla;epochs=1,2;eval_every=1,9;seed=0:3'
    wanted = command(tmp_path / 'study', words, data__validation_fraction=0.0)
    monkeypatch.setattr(study.benchmark, 'step_time', lambda config: 36.0)
    monkeypatch.setattr(study.plan, 'image_flops', lambda cohort, train=True: 5 if train else 1)
    options = dataclasses.replace(wanted.options, dry_run=True)
    assert study.main(dataclasses.replace(wanted, options=options), None) == 0
    out = ' '.join(capsys.readouterr().out.split())
    # A step has 5 * 32 operations; 1, 1, 2 and 1 evaluations, and 1, 1, 2 and 2 epochs.
    test = dataset.info(wanted.config).test
    hours = 3 * (5 * test + 5 * 96 * 6) / (5 * 32 / 36) / 3600
    assert f'12 runs, about {hours:.3g} hours' in out
    assert not (tmp_path / 'study').exists()


@pytest.mark.slow
def test_two_workers_share_a_study_and_one_that_is_killed_is_replaced(tmp_path):
    (tmp_path / 'grid.py').write_text(
        'from afkd_jax import Study\n'
        'from tests import tiny\n'
        'def get_config():\n'
        '    config = tiny.get_config()\n'
        '    config.epochs, config.data.train_examples = 8, 96\n'
        "    arms = {'vanilla': {'method': 'vanilla'}, 'dml': {}}\n"
        "    config.study = Study('grid', 'Is it shared?', arms, range(3))\n"
        '    return config\n'
    )
    workdir = tmp_path / 'study'
    mode = [f'--config={tmp_path / "grid.py"}', '--mode=study', f'--workdir={workdir}']
    process = forks.Launch([*mode, '--jobs', '2'])

    def holders():
        locks = ''.join(path.read_text() for path in workdir.glob('*/*/lock'))
        return {int(number) for number in re.findall(r'pid=(\d+)', locks)}

    while len(holders()) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(holders().pop(), signal.SIGKILL)
    code, output, errors = process.end()
    assert code == 0, errors
    assert 'was killed by signal 9; it is replaced' in output
    summaries = [json.loads(path.read_text()) for path in workdir.glob('*/*/summary.json')]
    assert len(summaries) == 6
    assert len({each['fingerprint'] for each in summaries}) == 6
    assert '6 runs: 6 done' in (workdir / 'report.md').read_text()
    assert 'Is it shared?' in (workdir / 'report.html').read_text()


def test_study_and_report_are_modes():
    assert cli.MODES['report'].no_config
    assert np.isin(['study', 'jobs', 'dry_run'], cli.MODES['study'].options).all()
