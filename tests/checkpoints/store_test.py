"""Checkpoints: retention, restoring, and the rejection of damaged and foreign ones."""

import contextlib
import hashlib
import json
import os
import random
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import PAIR, initial_state, take_devices, tiny_cohort, tiny_config

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import record
from afkd_jax.checkpoints import store as checkpoints_lib
from afkd_jax.checkpoints.progress import Best, Progress
from afkd_jax.checkpoints.store import Checkpoints, Snapshot
from afkd_jax.devices import arrays as arrays_lib
from afkd_jax.devices.mesh import REPLICATED
from afkd_jax.errors import UserError
from afkd_jax.method import metrics
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.training import run as run_lib

METADATA = {'versions': {'jax': '1'}, 'devices': '1 x cpu'}


def sums_of(config):
    return metrics.zeros(step_lib.value_shapes(tiny_cohort(config)))


@pytest.fixture(scope='module')
def snapshot():
    """A state and sums of random values, so that no two arrays are equal; on the host."""
    config, rng = tiny_config(), np.random.default_rng(0)
    arrays = initial_state(config), sums_of(config)
    arrays = jax.tree.map(
        lambda leaf: np.asarray(rng.integers(1, 9, np.shape(leaf)), np.asarray(leaf).dtype), arrays
    )
    return Snapshot(*arrays, Progress.start(2))


def origin(config):
    arrays = state_lib.abstract(tiny_cohort(config)), sums_of(config)
    return {
        'config': config_lib.run_fields(config),
        'images': {'train': 64, 'fingerprint': 'ab'},
        'arrays': arrays_lib.layout(arrays),
    }


def abstract(config, count=1):
    arrays = state_lib.abstract(tiny_cohort(config)), sums_of(config)
    return take_devices(count).abstract(arrays)


def opened(folder, config=None, keep=2):
    return Checkpoints(folder, origin(config or tiny_config()), METADATA, keep)


def write(folder, snapshot, steps, keep=9, config=None):
    with opened(folder, config, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, snapshot)


def names(folder):
    return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def same(a, b):
    fingerprints = [arrays_lib.fingerprint((x.state, x.sums)) for x in (a, b)]
    return fingerprints[0] == fingerprints[1] and a.progress == b.progress


def test_a_snapshot_is_restored_to_the_bit_on_any_number_of_devices(snapshot, tmp_path):
    progress = Progress(
        best=[Best(step=4, validation=98.6013986013986, test=97.5), None, None],
        saturated=[3, 0],
        warned=[True, False],
        evaluations={
            'test': (4, metrics.Evaluation([0.1, 1 / 3], [2.5, 1e-30], top5=[1.0, 1e-30]))
        },
        evaluated=4,
        images_per_s=[1e3, 2e3],
        wall_s=3.5,
        skipped=7,
    )
    for written in (1, 8):
        folder = tmp_path / str(written)
        folder.mkdir()
        state, sums = take_devices(written).replicate((snapshot.state, snapshot.sums))
        write(folder, Snapshot(state, sums, progress), [6])
        for count in (1, 2, 8):
            with opened(folder) as checkpoints:
                restored = checkpoints.restore(abstract(tiny_config(), count))
            assert same(restored.snapshot, Snapshot(snapshot.state, snapshot.sums, progress))
            whole = take_devices(count).shardings(REPLICATED)
            arrays = jax.tree.leaves((restored.snapshot.state, restored.snapshot.sums))
            assert all(leaf.sharding == whole for leaf in arrays)
            assert restored.metadata == METADATA
            assert (restored.rejected, restored.newer) == ({}, [])


@pytest.mark.slow
def test_a_snapshot_is_restored_to_the_bit_on_any_number_of_peers(tmp_path):
    config = tiny_config(('tiny-4-2',) * 4, dataset='digits')
    runs = {
        peers: run_lib.prepare(
            tiny_config(('tiny-4-2',) * 4, mesh__peer=peers, mesh__data=2, batch_size=64)
        )
        for peers in (1, 2, 4)
    }
    start = runs[1].fingerprint(runs[1].initial_state())
    for written, run in runs.items():
        folder = tmp_path / str(written)
        folder.mkdir()
        state = run.initial_state()
        write(folder, Snapshot(state, run.zero_sums(), Progress.start(4)), [3], config=config)
        for other in runs.values():
            with opened(folder, config) as checkpoints:
                restored = checkpoints.restore(other.abstract())
            assert restored.rejected == {}
            arrays = restored.snapshot.state
            assert other.fingerprint(arrays) == start
            for leaf, expected in zip(
                jax.tree.leaves(arrays), jax.tree.leaves(other.abstract()[0]), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_the_last_and_the_best_are_kept(snapshot, tmp_path):
    progress = Progress.start(2)
    with opened(tmp_path, keep=2) as checkpoints:
        for step in range(0, 18, 2):
            if step == 4:
                progress.best[0] = Best(4, validation=1.0, test=1.0)
            if step == 8:
                progress.best[2] = Best(8, validation=1.0, test=1.0)
            if step == 14:
                progress.best[2] = Best(14, validation=2.0, test=1.0)
            checkpoints.save(step, Snapshot(snapshot.state, snapshot.sums, progress))
            checkpoints.wait()
            if step == 12:
                assert names(tmp_path) == ['10', '12', '4', '8']
    assert names(tmp_path) == ['14', '16', '4']
    with opened(tmp_path) as checkpoints:
        for step in (4, 14, 16):
            assert checkpoints.restore(abstract(tiny_config()), step).snapshot.progress.best_steps()
        restored = checkpoints.restore(abstract(tiny_config()), 14)
        assert [path.name for path in restored.newer] == ['16']
        with pytest.raises(UserError, match='no checkpoint of step 2 .* there are 4, 14, 16'):
            checkpoints.restore(abstract(tiny_config()), 2)


def test_a_step_that_is_saved_again_is_replaced(snapshot, tmp_path):
    for expected in ('4', '4.2', '4.3', '4.4'):
        later = Progress.start(2)
        later.evaluated = len(expected)
        with opened(tmp_path) as checkpoints:
            checkpoints.save(4, Snapshot(snapshot.state, snapshot.sums, later))
            checkpoints.wait()
            assert names(tmp_path) == [expected]
            assert checkpoints.restore(abstract(tiny_config()), 4).snapshot.progress == later


def test_the_arrays_may_be_donated_while_a_save_is_written(snapshot, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        checkpoints_lib.Checkpoints,
        '_write',
        lambda self, step, arrays, content, best: written.append(arrays),
    )
    donating = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    arrays = take_devices(1).replicate((snapshot.state, snapshot.sums))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(0, Snapshot(*arrays, snapshot.progress))
        jax.block_until_ready(donating(arrays))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arrays))
    ((state, sums),) = written
    assert isinstance(state, state_lib.StackedState)  # the structure in which it is stored
    assert arrays_lib.fingerprint((state.unstack(), sums)) == arrays_lib.fingerprint(
        (snapshot.state, snapshot.sums)
    )


def test_the_best_is_the_first_with_the_highest_validation_accuracy():
    progress = Progress.start(2)
    assert progress.improved([1.0, 2.0, 3.0]) == [0, 1, 2]
    progress.best = [Best(2, validation=value, test=1.0) for value in (50.0, 60.0, 70.0)]
    assert progress.improved([50.0, 60.1, 69.9]) == [1]  # 50.0 again is no new maximum


def test_none_to_restore(tmp_path):
    with Checkpoints(tmp_path, origin(tiny_config())) as checkpoints:  # to read only
        assert checkpoints.restore(abstract(tiny_config())) is None
    assert list(tmp_path.iterdir()) == []
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(tiny_config())) is None
        with pytest.raises(UserError, match='no checkpoint of step 3 .* there are none'):
            checkpoints.restore(abstract(tiny_config()), 3)


@pytest.mark.parametrize(
    ('networks', 'method', 'difference'),
    [
        (('tiny-8-2', 'tiny-6-2'), 'afd', r"config.networks: \['tiny-8-2', 'tiny-8-2'\] -> \["),
        (PAIR, 'kd_ring', r"config.method: 'afd' -> 'kd_ring'"),
    ],
)
def test_a_checkpoint_of_another_run_is_rejected_with_the_differing_fields(
    networks, method, difference, snapshot, tmp_path
):
    write(tmp_path, snapshot, [1])
    config = tiny_config(networks, method=method)
    with (
        opened(tmp_path, config) as checkpoints,
        pytest.raises(
            UserError, match=f'no checkpoint can be used: 1 is of another run .*{difference}'
        ),
    ):
        checkpoints.restore(abstract(config))


def test_the_directory_of_the_images_identifies_no_checkpoint(snapshot, tmp_path):
    config = tiny_config(dataset='folder:/b')
    ours = origin(config)
    assert ours['config']['dataset'] == 'folder:'
    older = {**ours, 'config': ours['config'] | {'dataset': 'folder:/a'}}  # as older versions wrote
    for theirs, same in ((older, True), ({**ours, 'images': {'fingerprint': 'cd'}}, False)):
        content = {'step': 1, 'progress': snapshot.progress.to_json()}
        with contextlib.nullcontext() if same else pytest.raises(record.Unusable, match='finger'):
            checkpoints_lib.check_content(tmp_path / '1', content, theirs, ours)


def test_other_shapes_and_images_are_named_too(snapshot, tmp_path):
    write(tmp_path, snapshot, [1])
    ours = origin(tiny_config())
    ours['arrays']['0/step'] = 'int64[]'
    ours['images']['fingerprint'] = 'cd'
    with (
        Checkpoints(tmp_path, ours) as checkpoints,
        pytest.raises(
            UserError,
            match=r"images.fingerprint: 'ab' -> 'cd'; arrays.0/step: 'int32\[\]' -> 'int64\[\]'",
        ),
    ):
        checkpoints.restore(abstract(tiny_config()))


def _largest(folder):
    files = [path for path in (folder / 'arrays').rglob('*') if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def _flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


def _edit(path):
    # A well-formed record that says something else.
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


# What happens to the directory of a checkpoint, and part of the error message.
DAMAGES = {
    'truncated': (lambda folder: _cut(_largest(folder)), 'is damaged'),
    'flipped': (lambda folder: _flip(_largest(folder)), 'is damaged'),
    'a file gone': (lambda folder: _largest(folder).unlink(), 'is damaged'),
    'arrays gone': (lambda folder: shutil.rmtree(folder / 'arrays'), 'is damaged'),
    'emptied': (lambda folder: _largest(folder).write_bytes(b''), 'is damaged'),
    'record gone': (lambda folder: (folder / 'record.json').unlink(), 'has no readable record'),
    'record cut': (lambda folder: _cut(folder / 'record.json'), 'has no readable record'),
    'record edited': (lambda folder: _edit(folder / 'record.json'), 'was altered'),
    'record foreign': (lambda folder: (folder / 'record.json').write_text('[]'), 'has no read'),
    'all gone': (lambda folder: (shutil.rmtree(folder), folder.mkdir()), 'has no readable record'),
    'a file': (lambda folder: (shutil.rmtree(folder), folder.write_text('x')), 'has no readable'),
    'other arrays': (
        lambda folder: (
            shutil.rmtree(folder / 'arrays'),
            shutil.copytree(folder.parent / 'other/checkpoints/4/arrays', folder / 'arrays'),
        ),
        'is damaged',
    ),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, snapshot, tmp_path):
    damage, message = DAMAGES[name]
    write(tmp_path, snapshot, [2, 4])
    newest = tmp_path / 'checkpoints' / '4'
    if name == 'other arrays':
        other = jax.tree.map(lambda leaf: leaf + 1, snapshot.state)
        (tmp_path / 'checkpoints' / 'other').mkdir()
        write(
            tmp_path / 'checkpoints' / 'other',
            Snapshot(other, snapshot.sums, snapshot.progress),
            [4],
        )
    damage(newest)
    with opened(tmp_path, keep=9) as checkpoints:
        restored = checkpoints.restore(abstract(tiny_config()))
        assert list(restored.rejected) == [newest]
        assert message in restored.rejected[newest]
        assert same(restored.snapshot, snapshot)
        with pytest.raises(UserError, match=f'no checkpoint can be used: 4 .*{message}'):
            checkpoints.restore(abstract(tiny_config()), 4)
        damage(tmp_path / 'checkpoints' / '2')
        if name != 'record edited':  # there 2 does not say "step": 4
            with pytest.raises(
                UserError, match=r'no checkpoint can be used: 4 .*; 2 .*name another'
            ):
                checkpoints.restore(abstract(tiny_config()))


def test_a_checkpoint_under_the_name_of_another_step_is_rejected(snapshot, tmp_path):
    write(tmp_path, snapshot, [4])
    shutil.copytree(tmp_path / 'checkpoints' / '4', tmp_path / 'checkpoints' / '100')
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(tiny_config()))
    assert list(restored.rejected.values()) == ['is that of step 4']
    assert same(restored.snapshot, snapshot)


def test_a_file_that_cannot_be_read_is_damage_too(snapshot, tmp_path, monkeypatch):
    write(tmp_path, snapshot, [2, 4])
    digest = hashlib.file_digest

    def failing(file, kind):
        if 'checkpoints/4/' in file.name:
            raise OSError(5, 'Input/output error')
        return digest(file, kind)

    monkeypatch.setattr(hashlib, 'file_digest', failing)
    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(tiny_config()))
    ((path, why),) = restored.rejected.items()
    assert (path.name, why) == ('4', 'cannot be read ([Errno 5] Input/output error)')


def test_nothing_is_published_after_the_lock_is_lost(snapshot, tmp_path):
    def lost():
        raise UserError('lost')

    write(tmp_path, snapshot, [2])
    with (
        pytest.raises(UserError, match='lost'),
        Checkpoints(tmp_path, origin(tiny_config()), METADATA, 1, lost) as checkpoints,
    ):
        checkpoints.save(4, snapshot)
    assert '2' in names(tmp_path)
    assert '4' not in names(tmp_path)


def test_no_flipped_bit_goes_unnoticed(snapshot, tmp_path):
    write(tmp_path, snapshot, [4])
    rng = random.Random(0)
    files = sorted(path for path in (tmp_path / 'checkpoints' / '4').rglob('*') if path.is_file())
    files = [path for path in files if path.stat().st_size]
    with opened(tmp_path, keep=9) as checkpoints:
        for _ in range(100):
            path = rng.choice(files)
            whole = path.read_bytes()
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            with pytest.raises(UserError, match='no checkpoint can be used: 4 (is damaged|has )'):
                checkpoints.restore(abstract(tiny_config()))
            path.write_bytes(whole)
        assert same(checkpoints.restore(abstract(tiny_config())).snapshot, snapshot)


def test_what_a_killed_process_left_half_done_is_removed(snapshot, tmp_path):
    write(tmp_path, snapshot, [2])
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '2', folder / '4.unfinished')
    shutil.copytree(folder / '2', folder / '1.unfinished')
    (folder / 'notes').mkdir()  # not ours to touch
    with Checkpoints(tmp_path, origin(tiny_config())) as checkpoints:
        assert [path.name for path in checkpoints.paths()] == ['2']
    assert len(names(tmp_path)) == 4
    with opened(tmp_path) as checkpoints:
        assert [path.name for path in checkpoints.paths()] == ['2']
    assert names(tmp_path) == ['2', 'notes']


def test_a_state_that_has_overflowed_is_not_saved(snapshot, tmp_path):
    networks = jax.tree.map(np.copy, snapshot.state.networks)
    networks[1].params['trunk']['Conv_0']['kernel'][0, 0, 0, 0] = np.inf
    bad = Snapshot(snapshot.state.replace(networks=networks), snapshot.sums, snapshot.progress)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(2, snapshot)
        checkpoints.save(4, bad)
        with pytest.raises(UserError, match=r'step 4: .networks\[1\].params.*not finite.*diverged'):
            checkpoints.wait()
    assert names(tmp_path) == ['2']


@pytest.mark.parametrize('checked_first', [True, False])
def test_a_full_disk_is_named_and_earlier_checkpoints_are_intact(
    checked_first, snapshot, small_disk, monkeypatch
):
    folder, _ = small_disk
    if not checked_first:  # as when another program fills it in the meantime
        monkeypatch.setattr(checkpoints_lib, '_check_disk_space', lambda *_: None)
    write(folder, snapshot, [2])
    filler = folder / 'filler'
    with filler.open('wb', buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    why = 'are needed, 0.0 MB are free' if checked_first else 'No space left on device'
    with (
        pytest.raises(UserError, match=f'4: the checkpoint cannot be written .*{why}.*before it'),
        opened(folder) as checkpoints,
    ):
        checkpoints.save(4, snapshot)
    assert names(folder) == ['2']
    with opened(folder) as checkpoints:
        assert same(checkpoints.restore(abstract(tiny_config())).snapshot, snapshot)
        filler.unlink()
        checkpoints.save(4, snapshot)
    assert names(folder) == ['2', '4']


def test_the_error_of_a_save_is_raised_by_the_next_call(snapshot, tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(2, snapshot)
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(checkpoints._orbax, 'save', full)
        for raises in (checkpoints.poll, checkpoints.wait, lambda: checkpoints.save(6, snapshot)):
            checkpoints.save(4, snapshot)
            checkpoints._writing.exception()  # waits, so that poll() can know
            with pytest.raises(UserError, match='cannot be written .*No space left'):
                raises()
    assert names(tmp_path) == ['2']


@pytest.mark.parametrize('changed', ['a network', 'the sums'])
def test_arrays_that_are_read_as_others_than_were_written_are_rejected(
    changed, snapshot, tmp_path, monkeypatch
):
    write(tmp_path, snapshot, [2])
    with opened(tmp_path) as checkpoints:
        read = checkpoints._orbax.restore

        def other(*arguments, **named):
            state, sums = read(*arguments, **named)
            if changed == 'a network':
                # Both, stacked; one is changed.
                head = state['networks']['params']['head']['Dense_0']
                head['bias'] = head['bias'].at[1, 3].add(1e-6)
            else:
                sums = sums | {'steps': sums['steps'] + 1}
            return state, sums

        monkeypatch.setattr(checkpoints._orbax, 'restore', other)
        with pytest.raises(UserError, match='2 is read as other arrays than were written'):
            checkpoints.restore(abstract(tiny_config(), 1))


def test_the_record_describes_the_checkpoint(snapshot, tmp_path):
    write(tmp_path, snapshot, [2])
    state = snapshot.state
    content = json.loads((tmp_path / 'checkpoints/2/record.json').read_text())['content']
    assert content['step'] == 2
    assert content['origin']['config']['networks'] == list(PAIR)
    assert content['versions'] == {'jax': '1'}
    assert content['digests'] == {
        **{
            str(k): arrays_lib.fingerprint(part)
            for k, part in enumerate(zip(state.networks, state.discriminators, strict=True))
        },
        'sums': arrays_lib.fingerprint(snapshot.sums),
    }


def test_the_fingerprint_depends_on_every_array_and_bit(snapshot):
    state = snapshot.state
    fingerprint = arrays_lib.fingerprint(state)
    assert fingerprint == arrays_lib.fingerprint(jax.tree.map(np.copy, state))
    leaves, tree = jax.tree.flatten(state)
    for i in range(0, len(leaves), 5):
        changed = [np.array(leaf) for leaf in leaves]
        changed[i].reshape(-1).view(np.uint8)[-1] ^= 1
        assert arrays_lib.fingerprint(tree.unflatten(changed)) != fingerprint


def test_a_field_that_holds_no_array_is_not_stored(snapshot, tmp_path):
    # As in checkpoints from before there was such a field; with spectral norms it is stored.
    spectral = tiny_config(discriminator__norm='spectral')
    for name, config in (('batch', tiny_config()), ('spectral', spectral)):
        (tmp_path / name).mkdir()
        arrays = initial_state(config), sums_of(config)
        kept = Snapshot(*arrays, Progress.start(2))
        write(tmp_path / name, kept, [7], config=config)
        path = tmp_path / name / 'checkpoints' / '7' / 'arrays'
        with ocp.StandardCheckpointer() as orbax:
            stored = orbax.metadata(path).item_metadata.tree[0]['discriminators']
        more = {'batch_stats'} if name == 'spectral' else set()
        assert set(stored) == {'params', 'opt'} | more
        with opened(tmp_path / name, config) as checkpoints:
            restored = checkpoints.restore(abstract(config))
        assert same(restored.snapshot, kept)
