"""Whole runs: same seed, same bits; stopped and resumed, same bits; what is written."""

import dataclasses
import json
import pickle
import shutil
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax.checkpoints import store as checkpoints
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.data import dataset as sources
from afkd_jax.data import order as batches
from afkd_jax.devices import arrays as arrays_lib
from afkd_jax.devices import mesh
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import UserError
from afkd_jax.method import step as step_lib
from afkd_jax.registry import register_tracker
from afkd_jax.report import figures, jsonl
from afkd_jax.report.trackers import Tracker, TrainValues
from afkd_jax.training import epochs, evaluate, health
from afkd_jax.training import loop as train
from afkd_jax.training import run as run_lib

pytestmark = pytest.mark.usefixtures('compiled_once')
DRAW = figures.draw


def fit(config, workdir, step=None):
    with Interrupt() as interrupt:
        return train.train(config, workdir, step, interrupt)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:1])
    # Half a second each; the run that `uninterrupted` makes draws its curves.
    monkeypatch.setattr(figures, 'draw', lambda workdir: None)


def short_config(**fields):
    """Two epochs of 5 steps; 150 of 167 images in batches of 32 do not divide evenly."""
    fields = {'epochs': 2, 'batch_size': 32, 'log_every': 2, 'data__train_examples': 167} | fields
    return tiny_config(**fields)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Returns (workdir, summary) of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp('uninterrupted')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, 'available', lambda: jax.devices()[:1])
        return workdir, fit(short_config(trackers=('tensorboard',)), workdir)


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
        assert entry.keys() - keys - {'frozen'} == {'test_top5_accuracy'}  # None of ten classes
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
    spent = summary['seconds']
    assert list(spent) == ['data', 'compile', 'train', 'evaluate', 'save', 'other']
    assert all(seconds > 0 for seconds in spent.values())
    assert sum(spent.values()) == summary['wall_s']
    assert len(summary['fingerprint']) == 64
    assert 'cpu' in summary['device']


def test_the_metrics_name_their_step_and_epoch(uninterrupted):
    workdir, summary = uninterrupted
    (header,) = lines(workdir, 'run')
    assert header['config']['networks'] == ['tiny-8-2', 'tiny-8-2']
    assert {'versions', 'devices', 'commit', 'time'} <= set(header)
    assert {'python', 'jax'} <= set(header['versions'])
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
    # The line of an epoch has the means over all its steps: 1 to 5 and 6 to 10.
    ends = lines(workdir, 'epoch')
    assert [(row['step'], row['epoch']) for row in ends] == [(5, 1), (10, 2)]
    for row, parts in zip(ends, (rows[:3], rows[3:]), strict=True):
        assert row.keys() == rows[0].keys()
        assert row['images_per_s'] > 0
        weights = np.array([2, 2, 1] if row['step'] == 5 else [1, 2, 2])
        for k, name in [(0, 'cross_entropy'), (1, 'cross_entropy'), (1, 'd_own')]:
            values = [part['networks'][k][name] for part in parts]
            assert row['networks'][k][name] == pytest.approx(np.dot(weights, values) / 5, rel=1e-6)
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
        'config.json', 'images.json', 'metrics.jsonl', 'checkpoints', 'summary.json', 'curves.png',
        'classes.json', 'predictions.npz', 'tensorboard',
    }  # fmt: skip
    steps = {path.name for path in (workdir / 'checkpoints').iterdir()}
    assert steps == {'0', '5', '10'}
    curves = (workdir / 'curves.png').read_bytes()
    assert curves.startswith(b'\x89PNG')
    (events,) = (workdir / 'tensorboard').glob('events.*')
    assert curves in events.read_bytes()


@register_tracker('failing')
class Failing(Tracker):
    """Fails at the second log line."""

    def __init__(self, config, workdir):
        super().__init__()

    def handle(self, event):
        if isinstance(event, TrainValues) and event.step == 4:
            raise OSError(28, 'No space left on device')


def test_same_seed_same_bits_whatever_a_tracker_does(uninterrupted, tmp_path):
    again = fit(short_config(trackers=('failing',)), tmp_path)
    assert_same_run(tmp_path, again, uninterrupted)
    (warning,) = lines(tmp_path, 'warning')
    text = 'tracker "failing" failed (OSError: [Errno 28] No space left on device)'
    assert (warning['step'], warning['text']) == (4, f'{text}; the run continues without it')


def traced_steps(workdir):
    """Returns the numbers of the steps in a run's trace, and how often the step was executed."""
    (path,) = workdir.glob('profile/**/*.xplane.pb')
    steps, executions = [], set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            values = dict(event.stats)
            if event.name == 'train':
                steps.append(values['step_num'])
            if 'hlo_op' in values:
                executions.add(values['run_id'])
    return steps, len(executions)


def test_a_trace_has_the_steps_of_the_config_and_changes_nothing(uninterrupted, tmp_path):
    again = fit(short_config(profile=(3, 5)), tmp_path)  # the evaluation after step 5 is left out
    assert traced_steps(tmp_path) == ([3, 4, 5], 3)
    assert_same_run(tmp_path, again, uninterrupted)


def test_a_run_that_resumes_amid_its_steps_traces_the_others(every_step, uninterrupted, tmp_path):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    again = fit(config.replace(profile=(1, 9)), tmp_path, step=8)
    assert traced_steps(tmp_path) == ([9], 1)
    assert_same_run(tmp_path, again, uninterrupted)


def test_a_trace_that_fails_is_a_warning(uninterrupted, tmp_path, capsys):
    (tmp_path / 'profile').write_text('a file')
    again = fit(short_config(profile=(3, 5)), tmp_path)
    assert_same_run(tmp_path, again, uninterrupted)
    assert f'warning: {tmp_path}/profile: no trace is written (' in capsys.readouterr().out


def test_a_trace_of_steps_that_the_run_does_not_have_is_rejected(tmp_path):
    message = r'config.profile: must be steps of the run, which has 10, but is \(9, 11\)'
    with pytest.raises(UserError, match=message):
        fit(short_config(profile=(9, 11)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_seed_another_run(uninterrupted, tmp_path):
    other = fit(short_config(seed=1), tmp_path)
    assert other['fingerprint'] != uninterrupted[1]['fingerprint']


def test_the_seed_gives_the_weights_and_the_augmentation():
    states, draws = set(), set()
    for seed in (0, 1):
        run = run_lib.prepare(short_config(seed=seed))
        states.add(arrays_lib.fingerprint(run.initial_state()))
        draws |= {int(jax.random.bits(key)) for key in (run.init_key, run.step_key)}
    assert len(states) == 2
    assert len(draws) == 4


def test_a_signal_is_answered_by_what_it_waits_for(tmp_path, monkeypatch):
    effects = []

    def compiled_step(run):
        effects.append(interrupt.effect)
        raise InterruptedError

    monkeypatch.setattr(run_lib.Run, 'compiled_step', compiled_step)
    with Interrupt() as interrupt:
        effects.append(interrupt.effect)
        with pytest.raises(InterruptedError):
            train.train(short_config(), tmp_path, None, interrupt)
    assert effects == ['stops before the first step', 'stops after the compilation']


def values(workdir):
    """Returns the lines of metrics.jsonl about the run itself, without times."""
    rows = [row for kind in ('train', 'evaluation', 'epoch') for row in lines(workdir, kind)]
    return [{key: row[key] for key in row if key != 'images_per_s'} for row in rows]


RESULTS = ('fingerprint', 'networks', 'ensemble', 'ring', 'steps', 'evaluated')


def assert_same_run(workdir, summary, uninterrupted):
    for key in RESULTS:
        assert summary[key] == uninterrupted[1][key], key
    assert values(workdir) == values(uninterrupted[0])


@pytest.mark.parametrize('stop_at', [5, 7, 10])
def test_stopped_and_resumed_is_the_uninterrupted_run(
    stop_at, uninterrupted, tmp_path, monkeypatch
):
    # The signal comes while step `stop_at` is being prepared: it is finished, then saved. The
    # epochs end after steps 5 and 10: their evaluation is left to the process that continues.
    indices = batches.Order.indices

    def stopping(order, step):
        if step == stop_at - 1 and (tmp_path / 'metrics.jsonl').exists():
            signal.raise_signal(signal.SIGTERM)
        return indices(order, step)

    with monkeypatch.context() as patch:
        patch.setattr(batches.Order, 'indices', stopping)
        assert fit(short_config(), tmp_path) is None
    so_far = json.loads((tmp_path / 'summary.json').read_text())
    assert (so_far['finished'], so_far['steps']) == (False, stop_at)
    assert so_far['evaluated'] == ({} if stop_at == 5 else {'validation': 5, 'test': 5})
    with_scores = [entry for entry in so_far['networks'] if entry['test_accuracy'] is not None]
    assert len(with_scores) == (0 if stop_at == 5 else 2)
    assert str(stop_at) in {path.name for path in (tmp_path / 'checkpoints').iterdir()}
    left = '{"kind": "train", "st'  # as a killed process may leave it, here and below
    if stop_at != 7:  # one that went on from here, evaluated, and did not come to its save
        late = (f'{{"kind": "{kind}", "step": {stop_at}}}\n' for kind in ('evaluation', 'epoch'))
        left = ''.join(late) + left
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write(left)
    resumed = fit(short_config(), tmp_path)
    assert [row['step'] for row in lines(tmp_path, 'resume')] == [stop_at]
    assert (tmp_path / 'set_aside' / 'metrics.jsonl').read_text() == left + '\n'
    assert_same_run(tmp_path, resumed, uninterrupted)


@pytest.fixture(scope='module')
def every_step(tmp_path_factory):
    """Returns (config, workdir) of the same run with a checkpoint of every step."""
    workdir = tmp_path_factory.mktemp('every')
    config = short_config(checkpoint__every_steps=1, checkpoint__keep=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, 'available', lambda: jax.devices()[:1])
        fit(config, workdir)
    return config, workdir


def test_checkpoints_change_nothing(every_step, uninterrupted):
    _, workdir = every_step
    steps = {int(path.name) for path in (workdir / 'checkpoints').iterdir()}
    assert steps == set(range(11))
    summary = json.loads((workdir / 'summary.json').read_text())
    assert_same_run(workdir, summary, uninterrupted)


@pytest.mark.parametrize('step', [0, 3, 5, 8, 10])
def test_a_run_continues_from_any_checkpoint(step, every_step, uninterrupted, tmp_path):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert_same_run(tmp_path, fit(config, tmp_path, step), uninterrupted)
    # Nothing is lost: what is newer was set aside.
    aside = tmp_path / 'set_aside'
    assert (aside / 'summary.json').exists()
    newer = {path.name for path in (aside / 'checkpoints').glob('*')}
    assert newer == {str(later) for later in range(step + 1, 11)}
    if step < 10:
        past = (aside / 'metrics.jsonl').read_text().splitlines()
        assert past == [line for line in before if json.loads(line)['step'] > step]
    after = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert {line for line in before if json.loads(line)['step'] <= step} <= set(after)


@pytest.mark.slow
def test_a_run_continues_between_accumulated_steps_and_with_spectral_norms(tmp_path):
    fields = {'accumulate': 2, 'discriminator__norm': 'spectral', 'logit__rule': 'adamw'}
    config = short_config(checkpoint__every_steps=1, checkpoint__keep=100, **fields)
    whole = fit(config, tmp_path)
    assert fit(config, tmp_path, 7)['fingerprint'] == whole['fingerprint']


def test_epochs_without_an_evaluation_need_no_checkpoint(tmp_path):
    config = short_config(epochs=5, eval_every=3, checkpoint__every_epochs=4, checkpoint__keep=99)
    fit(config, tmp_path)
    steps = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
    assert steps == {0, 15, 19, 24}
    lines = jsonl.read(tmp_path / 'metrics.jsonl')
    assert [line['step'] for line in lines if line['kind'] == 'epoch'] == [5, 10, 15, 19, 24]


def test_a_time_may_trigger_a_checkpoint_too(tmp_path):
    config = short_config(method='vanilla', checkpoint__every_minutes=1e-9, checkpoint__keep=99)
    fit(config, tmp_path)
    steps = {int(path.name) for path in (tmp_path / 'checkpoints').iterdir()}
    assert steps == set(range(11))


def test_damaged_checkpoints_are_set_aside_and_the_run_is_the_same(
    every_step, uninterrupted, tmp_path, capsys
):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'summary.json').unlink()
    shutil.rmtree(tmp_path / 'checkpoints' / '10' / 'arrays')
    (tmp_path / 'checkpoints' / '9' / 'record.json').write_text('{')
    assert_same_run(tmp_path, fit(config, tmp_path), uninterrupted)
    output = capsys.readouterr().out
    assert 'checkpoints/10: this checkpoint is damaged: its file arrays/' in output
    assert 'checkpoints/9: this checkpoint has no readable record.json' in output
    assert 'continues from step 8 of 10' in output
    assert {path.name for path in (tmp_path / 'set_aside/checkpoints').iterdir()} == {'9', '10'}


def test_without_an_intact_checkpoint_a_run_does_not_start_over(every_step, tmp_path):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'summary.json').unlink()
    for path in (tmp_path / 'checkpoints').iterdir():
        (path / 'record.json').unlink()
    with pytest.raises(UserError, match='no checkpoint can be used: 10 has no .*; 0 has no'):
        fit(config, tmp_path)
    shutil.rmtree(tmp_path / 'checkpoints')
    with pytest.raises(UserError, match='the checkpoints of this run, which has begun, are gone'):
        fit(config, tmp_path)


def test_a_run_on_a_full_disk_continues_when_there_is_room(small_disk, uninterrupted):
    folder, resize = small_disk
    assert not resize('2m')
    config = short_config(checkpoint__every_steps=1, checkpoint__keep=99)
    with pytest.raises(UserError, match='cannot be written .No space left .*make room'):
        fit(config, folder / 'run')
    kept = [int(path.name) for path in (folder / 'run' / 'checkpoints').iterdir()]
    assert sorted(kept) == list(range(len(kept)))
    assert 1 < len(kept) < 10
    assert not resize('64m')
    assert_same_run(folder / 'run', fit(config, folder / 'run'), uninterrupted)


def test_a_damaged_line_is_told_and_set_aside(every_step, tmp_path, capsys):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_text().splitlines()
    path.write_text('\n'.join([whole[0], whole[1].replace('"step"', '"stop"'), *whole[2:], '{"ki']))
    fit(config, tmp_path, 8)
    assert 'metrics.jsonl: 1 lines were damaged; they are set aside' in capsys.readouterr().out
    aside = (tmp_path / 'set_aside' / 'metrics.jsonl').read_text()
    assert '"stop"' in aside
    assert '{"ki\n' in aside


def test_curves_that_cannot_be_drawn_hold_back_no_result(every_step, tmp_path, monkeypatch, capsys):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for name in ('curves.png', 'classes.json'):
        (tmp_path / name).unlink()

    def full(_):
        assert (tmp_path / 'summary.json').exists()
        assert (tmp_path / 'classes.json').exists()
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(figures, 'draw', full)
    assert fit(config, tmp_path, 10)['finished']
    output = capsys.readouterr().out
    assert 'curves.png cannot be drawn (OSError: [Errno 28] No space left on device)' in output
    monkeypatch.setattr(figures, 'draw', DRAW)
    assert fit(config, tmp_path)['steps'] == 10
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_a_finished_run_with_its_images_elsewhere_is_compared_with_them(
    every_step, tmp_path, monkeypatch
):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(workdir_lib, 'moved', lambda *_: 'they were moved')
    assert fit(config, tmp_path)['steps'] == 10

    def of_other_images(config, log, prepare=run_lib.prepare):
        run = prepare(config, log)
        return dataclasses.replace(
            run, pipeline=dataclasses.replace(run.pipeline, fingerprint='other')
        )

    monkeypatch.setattr(run_lib, 'prepare', of_other_images)
    with pytest.raises(UserError, match=r"is of another run \(images.fingerprint: .* -> 'other'"):
        fit(config, tmp_path)


def test_no_pickle_is_loaded(every_step, tmp_path):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    found, watching = [], [True]
    # A hook cannot be taken away again.
    sys.addaudithook(
        lambda event, arguments: (
            found.append(arguments) if event == 'pickle.find_class' and watching else None
        )
    )
    fit(config, tmp_path, 8)
    evaluate.evaluate(config, tmp_path, None)
    assert not found
    pickle.loads(pickle.dumps(fit))
    assert len(found) == 1  # it would have been seen
    watching.clear()


def test_a_foreign_checkpoint_is_refused_with_the_differing_fields(every_step, tmp_path):
    _, workdir = every_step
    shutil.copytree(workdir / 'checkpoints', tmp_path / 'checkpoints')
    message = r'10 is of another run \(config.seed: 0 -> 3\)'
    with pytest.raises(UserError, match=message):
        fit(short_config(seed=3), tmp_path)


def test_other_images_are_another_run(every_step, tmp_path, monkeypatch):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    dataset = sources.dataset

    def altered(config):
        images = dataset(config)
        images.test.examples.pixels[0, 0, 0] += 1
        return images

    monkeypatch.setattr(sources, 'dataset', altered)
    with pytest.raises(UserError, match='10 is of another run .images.fingerprint: '):
        fit(config, tmp_path, 10)


def test_a_run_moves_between_numbers_of_devices(every_step, tmp_path, monkeypatch, capsys):
    config, workdir = every_step
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for count, step in ((8, 8), (1, 9)):
        monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:count])  # noqa: B023
        assert fit(config, tmp_path, step)['steps'] == 10
    output = capsys.readouterr().out
    assert "devices: '1 x cpu (x86_64)' -> '8 x cpu (x86_64)': the run continues, but not" in output
    assert "devices: '8 x cpu (x86_64)' -> '1 x cpu (x86_64)'" in output


def test_a_run_that_was_killed_before_its_summary_writes_the_same_one(uninterrupted, tmp_path):
    workdir, summary = uninterrupted
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'summary.json').unlink()
    again = fit(short_config(), tmp_path)
    assert_same_run(tmp_path, again, uninterrupted)
    assert again['images_per_s'] == summary['images_per_s']


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, capsys):
    workdir, summary = uninterrupted
    before = (workdir / 'metrics.jsonl').read_bytes()
    assert fit(short_config(), workdir) == summary
    assert 'this run is finished' in capsys.readouterr().out
    assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_a_workdir_of_another_config_is_refused(uninterrupted):
    workdir, _ = uninterrupted
    with pytest.raises(UserError, match=r'another config \(seed: 0 -> 2; data.pad: 1 -> 0\)'):
        fit(short_config(seed=2, data__pad=0), workdir)


def test_a_run_that_diverges_is_ended_with_a_message(tmp_path):
    config = short_config(method='vanilla', logit__learning_rate=1e30)
    message = r'^step 2: cross_entropy of network 1 \(tiny-8-2\) is nan; the run has diverged'
    with pytest.raises(UserError, match=message):
        fit(config, tmp_path)
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
        assert 'NaN' not in line
    facts = json.loads((tmp_path / 'nonfinite.json').read_text())
    assert (facts['step'], facts['epoch']) == (2, 2 * 32 / 150)
    assert {'value': 'cross_entropy', 'network': 2, 'is': 'nan'} in facts['not_finite']
    assert [network['cross_entropy'] for network in facts['networks']] == ['nan', 'nan']
    assert facts['learning_rate_logit'] == pytest.approx(9.75e29, rel=0.01)
    assert facts['training_images'] == batches.Order(0, 150, 32).indices(1).tolist()
    # The first step was finite, the checkpoint before it stays.
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['0']


def failing(monkeypatch, bad):
    """Lets network 2 have a loss and a state that are no numbers in the steps that are `bad`."""
    update = step_lib.update

    def broken(cohort, state, *rest):
        new, values = update(cohort, state, *rest)
        poison = jnp.where(bad(state.step), jnp.nan, 0.0)
        values['cross_entropy'] += jnp.where(jnp.arange(2) == 1, poison, 0.0)
        return jax.tree.map(lambda x: x + poison.astype(x.dtype), new), values

    monkeypatch.setattr(step_lib, 'update', broken)


@pytest.mark.slow
def test_a_skipped_step_leaves_nothing_but_its_count(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, lambda step: step == 2)
    config = short_config(checkpoint__every_steps=1, checkpoint__keep=99)
    with pytest.raises(UserError, match=r'^step 3: cross_entropy of network 2 .tiny-8-2. is nan'):
        fit(config, tmp_path / 'stop')
    # Found before the checkpoint of step 3 was written, long before the log line of step 4.
    assert {path.name for path in (tmp_path / 'stop/checkpoints').iterdir()} == {'0', '1', '2'}

    config = config.replace(on_nonfinite='skip')
    continued = fit(config, tmp_path / 'stop')
    summary = fit(config, tmp_path / 'skip')
    assert continued['fingerprint'] == summary['fingerprint']
    assert values(tmp_path / 'stop') == values(tmp_path / 'skip')
    assert (summary['steps'], summary['steps_skipped']) == (10, 1)
    assert [row['skipped'] for row in lines(tmp_path / 'skip', 'train')] == [0, 1, 0, 0, 0, 0]
    (warning,) = lines(tmp_path / 'skip', 'warning')
    assert warning['text'].startswith('1 steps skipped, 1 in the whole run; step 3: cross_entropy')
    assert 'warning: step 4: 1 steps skipped' in capsys.readouterr().out
    run = run_lib.prepare(config)
    with checkpoints.Checkpoints(tmp_path / 'skip', run.origin()) as kept:
        states = [kept.restore(run.abstract(), step).snapshot.state for step in (2, 3, 4)]
    fingerprints = [arrays_lib.fingerprint(state.replace(step=0)) for state in states]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert [int(state.step) for state in states] == [2, 3, 4]


def test_a_run_that_only_skips_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(health, 'GIVE_UP', 3)
    failing(monkeypatch, lambda step: step >= 3)
    with pytest.raises(UserError, match=r'^step 8: the last 4 steps were all skipped, step 7: cro'):
        fit(short_config(on_nonfinite='skip'), tmp_path)


@pytest.mark.parametrize(('content', 'message'), [('[]', 'not an object'), ('{', 'cannot be read')])
def test_a_broken_config_json_is_refused(content, message, tmp_path):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=f'--workdir: .*{message}'):
        fit(short_config(), tmp_path)


def test_epochs_without_an_evaluation_are_saved_all_the_same(uninterrupted, tmp_path, capsys):
    config, workdir = short_config(eval_every=2), tmp_path / 'run'
    whole = fit(config, workdir)
    assert whole['fingerprint'] == uninterrupted[1]['fingerprint']
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch')]
    assert ['val %' in line for line in printed] == [False, True]
    assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'0', '5', '10'}
    assert {row['step'] for row in lines(workdir, 'evaluation')} == {10}
    assert whole['ensemble']['best_validation_step'] == 10
    shutil.copytree(workdir, tmp_path / 'again')
    assert_same_run(tmp_path / 'again', fit(config, tmp_path / 'again', 5), (workdir, whole))
    assert 'epoch 1/2' not in capsys.readouterr().out


@pytest.mark.parametrize(
    ('eval_every', 'evaluated'), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])]
)
def test_every_nth_epoch_and_the_last_are_evaluated(eval_every, evaluated):
    run = types.SimpleNamespace(config=short_config(epochs=5, eval_every=eval_every))
    evaluation = epochs.EpochEvaluation(types.SimpleNamespace(run=run), None)
    assert list(filter(evaluation.due, range(1, 6))) == evaluated


def test_without_validation_the_test_split_is_only_watched(tmp_path, monkeypatch):
    # Here also: pmap, on two devices.
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:2])
    config = short_config(method='kd_ring', mapping='pmap', data__validation_fraction=0.0, epochs=1)
    summary = fit(config, tmp_path)
    for entry in [*summary['networks'], summary['ensemble']]:
        assert entry['validation_accuracy'] is None
        assert entry['test_accuracy_at_best_validation'] is None
        assert entry['best_validation_step'] is None
        assert entry['test_accuracy'] is not None
    assert {row['split'] for row in lines(tmp_path, 'evaluation')} == {'test'}


@pytest.mark.slow
def test_networks_on_several_devices_stop_and_continue_to_the_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:4])
    config = short_config(mesh__peer=2, checkpoint__every_steps=3)
    summary = fit(config, tmp_path / 'run')
    assert summary['device'].endswith(', 2 peer x 2 data')
    assert fit(config, tmp_path / 'run', step=6)['fingerprint'] == summary['fingerprint']
    # A checkpoint of theirs goes on where each device has all networks.
    monkeypatch.setattr(mesh, 'available', lambda: jax.devices()[:2])
    moved = fit(short_config(), tmp_path / 'run', step=5)
    for a, b in zip(moved['networks'], summary['networks'], strict=True):
        assert abs(a['test_accuracy'] - b['test_accuracy']) < 3
    assert evaluate.evaluate(config, tmp_path / 'run', None)['step'] == 10
