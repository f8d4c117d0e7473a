"""Health checks: the step, network and value that is not finite; saturated discriminators."""

import json
import types

import jax
import numpy as np
import pytest
from conftest import tiny_config

from afkd_jax.checkpoints.progress import Progress
from afkd_jax.data import order as batches
from afkd_jax.errors import UserError
from afkd_jax.method import metrics
from afkd_jax.report.trackers import Tracker
from afkd_jax.training.health import Health


class Warnings(Tracker):
    def __init__(self):
        super().__init__()
        self.texts = []

    def handle(self, event):
        self.texts.append((event.step, event.text))


def checking(folder, **fields):
    """Returns (health, progress, its warnings) of a session without devices."""
    run = types.SimpleNamespace(
        config=tiny_config(**fields),
        cohort=types.SimpleNamespace(names=('a', 'b'), learns=lambda k: True),
        order=batches.Order(seed=0, examples=64, batch_size=16),
    )
    progress, tracker = Progress.start(2), Warnings()
    session = types.SimpleNamespace(
        run=run,
        workdir=folder,
        tracker=tracker,
        snapshot=types.SimpleNamespace(progress=progress),
    )
    return Health(session), progress, tracker.texts


SHAPES = {
    'accuracy': (2,), 'cross_entropy': (2,), 'grad_norm_logit': (2,), 'd_own': (2,),
    'd_teacher': (2,), 'learning_rate_logit': (),
}  # fmt: skip


def sums(step=1, steps=10, **values):
    """Returns the fetched sums of `steps` steps with these values, the last of them `step`."""
    total = metrics.zeros(SHAPES)
    values = {name: np.full(SHAPES[name], 0.5, np.float32) for name in SHAPES} | {
        name: np.float32(value) for name, value in values.items()
    }
    for number in range(step - steps + 1, step + 1):
        total = metrics.add(total, values, metrics.finite(values), np.int32(number))
    return jax.device_get(total)


def test_means_are_over_the_steps_that_are_not_skipped():
    total = metrics.zeros({'x': (2,)})
    for step, x in enumerate(([1, 2], [3, np.nan], [np.inf, 0], [5, 6]), start=11):
        values = {'x': np.float32(x)}
        total = metrics.add(total, values, metrics.finite(values), np.int32(step))
    total = jax.device_get(total)
    assert (total.steps, total.skipped, total.first_skipped) == (2, 2, 12)
    np.testing.assert_array_equal(total.skipped_values['x'], [3, np.nan])
    assert metrics.means(total) == {'x': [3, 4]}


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'cross_entropy': [1, np.nan]}, r'^step 1: cross_entropy of network 2 \(b\) is nan'),
        ({'grad_norm_logit': [np.inf, 1]}, r'^step 1: grad_norm_logit of network 1 \(a\) is inf'),
        ({'d_own': [1, -np.inf]}, r'^step 1: d_own of network 2 \(b\) is -inf'),
        ({'learning_rate_logit': np.inf}, '^step 1: learning_rate_logit is inf'),
        # What follows from it comes after it.
        (
            {
                'grad_norm_logit': [np.nan] * 2,
                'accuracy': [np.nan] * 2,
                'cross_entropy': [1, np.inf],
            },
            r'^step 1: cross_entropy of network 2 \(b\) is inf',
        ),
    ],
)
def test_the_message_names_step_value_and_network(values, message, tmp_path):
    health, progress, warnings = checking(tmp_path)
    with pytest.raises(UserError, match=f'{message}; .*on_nonfinite=skip .see .*nonfinite.json'):
        health.check_line(1, sums(steps=1, **values))
    facts = json.loads((tmp_path / 'nonfinite.json').read_text())
    assert facts['step'] == 1
    assert facts['not_finite'][0]['is'] in message
    assert facts['training_images'] == batches.Order(0, 64, 16).indices(0).tolist()
    assert (progress.skipped, warnings) == (0, [])


def test_finite_sums_leave_no_trace(tmp_path):
    health, progress, warnings = checking(tmp_path)
    health.check_finite(sums())
    health.check_line(10, sums())
    assert (progress, warnings, list(tmp_path.iterdir())) == (Progress.start(2), [], [])


def test_skipped_steps_are_counted_once_and_end_the_run_only_in_a_row(tmp_path):
    health, progress, warnings = checking(tmp_path, on_nonfinite='skip')
    bad = {'cross_entropy': [np.nan, 1]}
    for step in range(30, 150, 30):
        health.check_finite(sums(step, 20, **bad))  # before a checkpoint: not counted
        health.check_line(step, sums(step, 20, **bad))
        health.check_line(step + 10, sums(step + 10, 10))
    assert (progress.skipped, progress.skipped_in_a_row, len(warnings)) == (80, 0, 4)
    health.check_line(200, sums(200, 49, **bad))
    with pytest.raises(UserError, match='^step 201: the last 50 steps were all skipped, step 201'):
        health.check_line(201, sums(201, 1, **bad))


def test_a_saturated_discriminator_is_reported_once(tmp_path):
    health, progress, warnings = checking(tmp_path, saturation_steps=25)
    dead = {'d_own': [0.001, 0.3], 'd_teacher': [0.999, 0.999]}
    for step in (10, 20, 30, 40):
        health.check_line(step, sums(step, **dead))
    assert progress.saturated == [40, 0]
    ((step, text),) = warnings
    assert step == 30
    assert 'discriminator of network 1 (a) has been saturated for 30 steps' in text
    assert 'mean output 0.0010 on own and 0.9990 on' in text
    health.check_line(50, sums(50))  # it lives again
    for step in (60, 70, 80):
        health.check_line(step, sums(step, d_own=[0, 1], d_teacher=[0, 1]))
    assert [step for step, _ in warnings] == [30, 80, 80]


@pytest.mark.parametrize('loss', ['lsgan', 'hinge'])
def test_what_saturation_means_depends_on_the_loss(loss, tmp_path):
    health, _, warnings = checking(tmp_path, saturation_steps=5, discriminator__loss=loss)
    health.check_line(10, sums(10, d_own=[0, 0.5], d_teacher=[1, 1]))
    ((_, text),) = warnings
    flat = 'its network learns next to nothing from it'  # only a sigmoid is flat at its ends
    assert (flat in text) == (loss == 'lsgan')
    assert ('goals of its loss' in text) == (loss == 'hinge')


def test_no_warning_where_none_is_wanted_or_there_is_no_discriminator(tmp_path):
    dead = sums(d_own=[0, 0], d_teacher=[1, 1])
    without = {name: total for name, total in dead.totals.items() if not name.startswith('d_')}
    for steps, seen in ((0, dead), (1, dead.replace(totals=without))):
        health, progress, warnings = checking(tmp_path, saturation_steps=steps)
        health.check_line(10, seen)
        assert (progress.saturated, warnings) == ([0, 0], [])


def test_a_run_that_continues_with_a_smaller_limit_is_warned_too(tmp_path):
    health, progress, warnings = checking(tmp_path, saturation_steps=25)
    progress.saturated = [40, 0]
    for step in (10, 20):
        health.check_line(step, sums(step, d_own=[0, 0.5], d_teacher=[1, 1]))
    assert [step for step, _ in warnings] == [10]
