"""Runs that start from trained weights, with frozen networks, or that grow."""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import tiny_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import afkd_jax
from afkd_jax.checkpoints import starts, weights
from afkd_jax.devices import mesh
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import UserError
from afkd_jax.tools import export
from afkd_jax.training import loop
from afkd_jax.training import run as run_lib


def config_of(**fields):
    fields = {'epochs': 1, 'method': 'vanilla', 'logit__schedule': 'constant'} | fields
    return tiny_config(batch_size=32, data__train_examples=107, **fields)


def trained(workdir, *, extend=False, **fields):
    with pytest.MonkeyPatch.context() as patch, Interrupt() as interrupt:
        patch.setattr(mesh, 'available', lambda: jax.devices()[:1])
        config = starts.resolved(config_of(**fields), workdir)
        return loop.train(config, workdir, None, interrupt, extend)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """The directory of a run of two different networks."""
    workdir = tmp_path_factory.mktemp('source')
    assert trained(workdir, networks=('tiny-4-1', 'tiny-8-2'))
    return workdir


@pytest.fixture(scope='module')
def exported(source, tmp_path_factory):
    """Network 1 of it as safetensors."""
    path = tmp_path_factory.mktemp('exported') / 'one.safetensors'
    path.write_bytes(export.safetensors(afkd_jax.load(source, 1)))
    return str(path)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_an_entry_of_networks_that_names_weights_is_a_frozen_network(source, exported, tmp_path):
    config = config_of(networks=(f'{source}:2', 'tiny-8-2', exported))
    found = starts.resolved(config, tmp_path)
    assert found.networks == ('tiny-8-2', 'tiny-8-2', 'tiny-4-1')
    assert found.frozen == (1, 3)
    assert found.init_from == (f'{source}:2', '', exported)
    assert starts.resolved(found, tmp_path) == found
    assert_equal(weights.read(exported).variables, weights.read(f'{source}:1').variables)


def test_a_run_with_a_frozen_teacher(source, tmp_path):
    """It trains, evaluates and loads; the teacher in it is, to the bit, that of the source.

    It resumes without the source.
    """
    workdir, moved = tmp_path / 'student', tmp_path / 'moved'
    moved.symlink_to(source)
    fields = {'networks': (f'{moved}:1', 'tiny-8-2'), 'method': 'afd'}
    result = trained(workdir, **fields)
    moved.unlink()
    assert trained(workdir, **fields) == result
    before, after = afkd_jax.load(source, 1), afkd_jax.load(workdir, 1)
    assert_equal(before.variables, after.variables)
    summary = json.loads((source / 'summary.json').read_text())
    accuracies = [each['networks'][0]['test_accuracy'] for each in (summary, result)]
    assert accuracies[0] == accuracies[1]
    assert [edge['network'] for edge in result['ring']] == [2]
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    line = next(line for line in lines if 'mimicry_kl' in line.get('networks', [{}])[0])
    assert line['networks'][0]['mimicry_kl'] == 0
    assert line['networks'][1]['mimicry_kl'] > 0


def test_a_network_starts_from_the_weights_of_another_run(source, exported, monkeypatch, capsys):
    config = config_of(networks=('tiny-4-1', 'tiny-8-2', 'tiny-4-1'))
    start = config.replace(init_from=(exported, f'{source}:2', ''))
    random, started = (run_lib.prepare(each).initial_state().networks for each in (config, start))
    for k in (0, 1):
        assert_equal(started[k].variables(), afkd_jax.load(source, k + 1).variables)
    assert_equal(started[2], random[2])
    # Networks of one architecture that are sharded.
    with monkeypatch.context() as patch:
        patch.setattr(mesh, 'available', lambda: jax.devices()[:2])
        sharded = config_of(init_from=(f'{source}:2', ''), mesh__peer=2, method='kd_ring')
        state = run_lib.prepare(sharded).initial_state().unstack()
        assert_equal(state.networks[0].variables(), afkd_jax.load(source, 2).variables)
    # Other classes: another classifier, from the run's seed.
    read = weights.read
    monkeypatch.setattr(
        weights, 'read', lambda name: dataclasses.replace(read(name), classes=('a', 'b'))
    )
    started = run_lib.prepare(start).initial_state().networks
    assert 'with a new classifier: the classes are others' in capsys.readouterr().out
    assert_equal(started[0].params['trunk'], afkd_jax.load(source, 1).variables['params']['trunk'])
    assert_equal(started[0].params['head'], random[0].params['head'])


def test_an_older_checkpoint_is_used_with_a_warning_and_its_step(source, tmp_path, capsys):
    damaged = tmp_path / 'source'
    shutil.copytree(source, damaged)
    (damaged / 'checkpoints/3/record.json').write_text('')
    config = config_of(networks=(f'{damaged}:1', 'tiny-8-2'), init_from=('', f'{source}:2'))
    run = run_lib.prepare(starts.resolved(config, tmp_path))
    assert run.starts.keys() == {0, 1}
    assert afkd_jax.load(damaged, 2).step == 0
    first, *lines, last = capsys.readouterr().out.splitlines()
    path = damaged / 'checkpoints/3'
    assert re.fullmatch(f'warning: {path}: this checkpoint .*; that of step 0 is used', first)
    assert lines == [
        f'network 1 (tiny-4-1) starts from {damaged}:1, step 0, frozen',
        f'network 2 (tiny-8-2) starts from {source}:2, step 3',
    ]
    assert last == first


def test_weights_that_do_not_fit(source, exported, monkeypatch, tmp_path):
    other = str(tmp_path / 'other.safetensors')  # another program's
    save_file({'weight': np.zeros(3, np.float32)}, other, {'format': '"np"'})
    for fields, words in [
        ({'networks': ('none/x:1', 'tiny-8-2')}, 'there is no directory none/x'),
        ({'networks': (f'{source}:3', 'tiny-8-2')}, r'has the networks 1 \.\. 2'),
        ({'networks': ('none.safetensors', 'tiny-8-2')}, 'none.safetensors: cannot be read as an'),
        ({'networks': (other, 'tiny-8-2')}, 'other.safetensors: cannot be read as an'),
        ({'init_from': ('x', '')}, r"init_from: must name a network of a run, .* but is 'x'"),
        (
            {'init_from': (f'{source}:1', '')},
            r'is a tiny-4-1 and does not fit "tiny-8-2": params/trunk/.* is \(4,\), not',
        ),
        (
            {'networks': (exported, 'tiny-8-2'), 'init_from': ('other:1', '')},
            'is the frozen network .* and cannot start from other:1',
        ),
    ]:
        with pytest.raises(UserError, match=words):
            trained(tmp_path / 'run', **fields)
    frozen = {'networks': (f'{source}:1', 'tiny-8-2')}
    for field, value, words in [
        ('classes', ('a', 'b'), 'was trained with the classes a, b, but the images of this run'),
        ('image_shape', (9, 9, 1), 'was trained with the image shape 9, 9, 1'),
        ('mean', (0.1,), r'another mean and standard deviation; set config\.data\.mean=\(0\.1,\)'),
    ]:
        changed = dataclasses.replace(weights.read(f'{source}:1'), **{field: value})
        monkeypatch.setattr(weights, 'read', lambda _, changed=changed: changed)
        with pytest.raises(UserError, match=words):
            trained(tmp_path / 'run', **frozen)
        monkeypatch.undo()


def test_damaged_exports_are_rejected(exported, tmp_path):
    with safe_open(exported, 'numpy') as file:
        facts = file.metadata()
    whole, path = load_file(exported), str(tmp_path / 'damaged.safetensors')
    key = next(name for name in whole if whole[name].ndim == 4)
    for tensors, words in [
        (whole | {'more': whole[key]}, r'more is \(.*\), not there'),
        (whole | {f'{key}/x': whole[key]}, 'has no valid description'),
        (whole | {key: whole[key] * np.nan}, f'params/{key} holds float32 values that are no fin'),
        (whole | {key: whole[key].astype(np.int32)}, f'params/{key} holds int32 values'),
    ]:
        save_file(tensors, path, facts)
        with pytest.raises(UserError, match=words):
            trained(tmp_path / 'run', networks=(path, 'tiny-8-2'))
    for architecture in ('[]', '3', '[3]', '["a", "b"]', '"tiny-8-2"'):
        save_file(whole, path, facts | {'architecture': architecture})
        with pytest.raises(UserError, match='it has no description of a network'):
            weights.architecture_of(path)


def test_a_run_that_is_extended_equals_one_that_was_longer_from_the_start(tmp_path):
    """With a constant learning rate; its record says where it grew."""
    whole = trained(tmp_path / 'whole', epochs=2)
    workdir = tmp_path / 'grown'
    assert trained(workdir)['extensions'] == []
    with pytest.raises(UserError, match=r'epochs: 1 -> 2.*, or add --extend to train it longer'):
        trained(workdir, epochs=2)
    texts = {name: (workdir / name).read_text() for name in ('config.json', 'summary.json')}
    for name in texts:  # then the checkpoints say what the run is
        (workdir / name).unlink()
    with pytest.raises(UserError, match=r'are of a run of 1 epochs, not of 2; add --extend'):
        trained(workdir, epochs=2)
    for name, text in texts.items():
        (workdir / name).write_text(text)
    with pytest.raises(UserError, match=r'seed: 0 -> 1\)'):
        trained(workdir, epochs=2, seed=1, extend=True)
    with pytest.raises(UserError, match='holds no run; train first'):
        trained(tmp_path / 'none', extend=True)
    grown = trained(workdir, epochs=2, extend=True)
    assert grown['fingerprint'] == whole['fingerprint']
    assert grown['extensions'] == [{'step': 3, 'epochs': 1}]
    assert (grown['steps'], grown['epochs']) == (6, 2)
    assert json.loads((workdir / 'config.json').read_text())['epochs'] == 2
    assert (workdir / 'set_aside/summary.json').exists()
    assert afkd_jax.load(workdir, 1, step=3).step == 3  # a checkpoint of the shorter run
    assert trained(workdir, epochs=2, extend=True)['fingerprint'] == whole['fingerprint']
    with pytest.raises(UserError, match=r'epochs: 2 -> 1'):
        trained(workdir, extend=True)


def test_an_extension_that_is_killed_before_its_first_checkpoint_continues(tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    trained(workdir)

    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('afkd_jax.checkpoints.store._check_disk_space', full)
        with pytest.raises(UserError, match='No space left'):
            trained(workdir, epochs=2, extend=True)
    assert json.loads((workdir / 'config.json').read_text())['epochs'] == 1
    assert trained(workdir, epochs=2, extend=True)['extensions'] == [{'step': 3, 'epochs': 1}]
    assert os.path.exists(workdir / 'summary.json')
