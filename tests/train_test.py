"""Whole runs: same seed, same bits; stopped and resumed, same bits; what is written."""

import json
import shutil
import signal

import jax
import pytest
from conftest import tiny_config

from afkd_jax import parallel, train
from afkd_jax import run as run_lib
from afkd_jax import state as state_lib
from afkd_jax.data import batches
from afkd_jax.errors import UserError

LOCAL = parallel.Devices.local


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(parallel.Devices, 'local', lambda mapping: LOCAL(mapping, 1))


def short_config(**fields):
    """Two epochs of 5 steps; 150 images in batches of 32 do not divide evenly."""
    fields = {'epochs': 2, 'batch_size': 32, 'log_every': 2, 'data__train_examples': 150} | fields
    return tiny_config(**fields)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Returns (workdir, summary) of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.Devices, 'local', lambda mapping: LOCAL(mapping, 1))
        return workdir, train.train(short_config(), workdir)


def lines(workdir, kind):
    text = (workdir / 'metrics.jsonl').read_text()
    return [line for line in map(json.loads, text.splitlines()) if line['kind'] == kind]


def test_the_summary_has_what_it_promises(uninterrupted):
    workdir, summary = uninterrupted
    assert summary == json.loads((workdir / 'summary.json').read_text())
    keys = {
        'name',
        'parameters',
        'feature_map',
        'validation_accuracy',
        'test_accuracy',
        'test_accuracy_at_best_validation',
        'best_validation_step',
    }
    for entry in [*summary['networks'], summary['ensemble']]:
        assert set(entry) == keys
        assert all(0 <= entry[key] <= 100 for key in keys if 'accuracy' in key)
        # What was selected can be found in metrics.jsonl.
        (chosen,) = [
            line
            for line in lines(workdir, 'evaluation')
            if (line['step'], line['split']) == (entry['best_validation_step'], 'test')
        ]
        place = [*summary['networks'], summary['ensemble']].index(entry)
        assert chosen['networks'][place]['accuracy'] == entry['test_accuracy_at_best_validation']
    assert [entry['name'] for entry in summary['networks']] == ['tiny-8-2', 'tiny-8-2']
    assert summary['networks'][0]['parameters'] == 9 * 8 + 16 + 90
    assert summary['networks'][0]['feature_map'] == [4, 4, 8]
    assert [(edge['network'], edge['teacher']) for edge in summary['ring']] == [(1, 2), (2, 1)]
    for edge in summary['ring']:
        assert edge['agreement'] + edge['disagreement'] == pytest.approx(100)
        assert 0 < edge['cosine'] < 1
        assert 0 < edge['l1'] < edge['l2']
    assert summary['steps'] == 10
    assert summary['epochs'] == 2
    assert summary['images_per_s'] > 0
    assert 0 < summary['compile_s'] < summary['wall_s']
    assert len(summary['fingerprint']) == 64
    assert 'cpu' in summary['device']


def test_the_metrics_name_their_step_and_epoch(uninterrupted):
    workdir, summary = uninterrupted
    (header,) = lines(workdir, 'run')
    assert header['config']['networks'] == ['tiny-8-2', 'tiny-8-2']
    assert {'versions', 'devices', 'commit', 'python', 'time'} <= set(header)
    rows = lines(workdir, 'train')
    # Every second step, and the ends of the epochs after 5 and 10 steps.
    assert [row['step'] for row in rows] == [2, 4, 5, 6, 8, 10]
    assert rows[-1]['epoch'] == pytest.approx(10 * 32 / 150)
    per_network = {
        'name', 'cross_entropy', 'accuracy', 'mimicry_kl', 'adversarial', 'discriminator', 'd_own',
        'd_teacher', 'grad_norm_logit', 'grad_norm_feature', 'grad_norm_discriminator',
    }  # fmt: skip
    for row in rows:
        assert [set(network) for network in row['networks']] == [per_network] * 2
        assert {'images_per_s', 'learning_rate_logit', 'learning_rate_feature'} <= set(row)
        assert 0 < row['networks'][0]['d_own'] < 1
    scores = lines(workdir, 'evaluation')
    assert [(row['step'], row['split']) for row in scores] == [
        (5, 'test'),
        (5, 'validation'),
        (10, 'test'),
        (10, 'validation'),
    ]
    final = [network['accuracy'] for network in scores[2]['networks']]
    entries = [*summary['networks'], summary['ensemble']]
    assert final == [entry['test_accuracy'] for entry in entries]


def test_the_workdir_is_complete(uninterrupted):
    workdir, _ = uninterrupted
    assert {path.name for path in workdir.iterdir()} == {
        'config.json', 'metrics.jsonl', 'checkpoints', 'summary.json', 'curves.png',
    }  # fmt: skip
    steps = {path.name for path in (workdir / 'checkpoints').iterdir()}
    assert steps == {'5', '10'}
    assert (workdir / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_same_seed_same_bits(uninterrupted, tmp_path):
    again = train.train(short_config(), tmp_path)
    assert again['fingerprint'] == uninterrupted[1]['fingerprint']


def test_another_seed_another_run(uninterrupted, tmp_path):
    other = train.train(short_config(seed=1), tmp_path)
    assert other['fingerprint'] != uninterrupted[1]['fingerprint']


def test_the_seed_gives_the_weights_and_the_augmentation():
    states, draws = set(), set()
    for seed in (0, 1):
        run = run_lib.prepare(short_config(seed=seed))
        states.add(state_lib.fingerprint(run.initial_state()))
        draws |= {int(jax.random.bits(key)) for key in (run.init_key, run.step_key)}
    assert len(states) == 2
    assert len(draws) == 4


@pytest.mark.parametrize('stop_at', [5, 7])
def test_stopped_and_resumed_is_the_uninterrupted_run(
    stop_at, uninterrupted, tmp_path, monkeypatch
):
    # The signal comes while step `stop_at` is being prepared: it is finished, then saved.
    indices = batches.Order.indices

    def stopping(order, step):
        if step == stop_at - 1 and (tmp_path / 'metrics.jsonl').exists():
            signal.raise_signal(signal.SIGTERM)
        return indices(order, step)

    with monkeypatch.context() as patch:
        patch.setattr(batches.Order, 'indices', stopping)
        assert train.train(short_config(), tmp_path) is None
    assert not (tmp_path / 'summary.json').exists()
    assert str(stop_at) in {path.name for path in (tmp_path / 'checkpoints').iterdir()}
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "train", "st')  # as a killed process may leave it
    resumed = train.train(short_config(), tmp_path)
    text = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in text if not line.endswith('"st')]
    assert len(rows) == len(text) - 1
    assert [row['step'] for row in rows if row['kind'] == 'resume'] == [stop_at]
    logged = [row['step'] for row in rows if row['kind'] == 'train']
    assert logged == sorted({2, 4, 5, 6, 8, 10} | {stop_at})
    for key in ('fingerprint', 'networks', 'ensemble', 'ring', 'steps'):
        assert resumed[key] == uninterrupted[1][key], key


def test_a_run_that_was_killed_before_its_summary_writes_the_same_one(uninterrupted, tmp_path):
    workdir, summary = uninterrupted
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'summary.json').unlink()
    again = train.train(short_config(), tmp_path)
    for key in ('fingerprint', 'networks', 'ensemble', 'ring', 'steps', 'images_per_s'):
        assert again[key] == summary[key], key


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, capsys):
    workdir, summary = uninterrupted
    before = (workdir / 'metrics.jsonl').read_bytes()
    assert train.train(short_config(), workdir) == summary
    assert 'this run is finished' in capsys.readouterr().out
    assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_workdir_of_another_config_is_refused(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(UserError, match=r'another config \(data.pad: 1 -> 0; seed: 0 -> 2\)'):
        train.train(short_config(seed=2, data__pad=0), workdir)


def test_a_run_that_diverges_is_ended_with_a_sentence(tmp_path):
    config = short_config(method='vanilla', logit__learning_rate=1e30)
    with pytest.raises(UserError, match=r'step \d+: \w+ is .*has diverged.*learning_rate'):
        train.train(config, tmp_path)
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
        assert 'NaN' not in line


@pytest.mark.parametrize(
    ('content', 'sentence'), [('[]', 'not an object'), ('{', 'cannot be used')]
)
def test_a_broken_config_json_is_refused(content, sentence, tmp_path):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=f'--workdir: .*{sentence}'):
        train.train(short_config(), tmp_path)


def test_checkpoints_of_an_unknown_config_are_refused(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UserError, match=r'has checkpoints, but no config.json'):
        train.train(short_config(), tmp_path)


def test_without_validation_the_test_split_is_only_watched(tmp_path, monkeypatch):
    # Here also: pmap, on two devices.
    monkeypatch.setattr(parallel.Devices, 'local', lambda mapping: LOCAL(mapping, 2))
    config = short_config(method='kd_ring', mapping='pmap', data__validation_fraction=0.0, epochs=1)
    summary = train.train(config, tmp_path)
    for entry in [*summary['networks'], summary['ensemble']]:
        assert entry['validation_accuracy'] is None
        assert entry['test_accuracy_at_best_validation'] is None
        assert entry['best_validation_step'] is None
        assert entry['test_accuracy'] is not None
    assert {row['split'] for row in lines(tmp_path, 'evaluation')} == {'test'}
