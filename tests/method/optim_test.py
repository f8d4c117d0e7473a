"""Schedules, and the three optimizers against plain formulas."""

import math

import numpy as np
import pytest
from conftest import tiny_cohort, tiny_config

from afkd_jax.method import optim


def rates(schedule, steps):
    return [float(schedule(step)) for step in steps]


def test_steps_multiply_from_the_converted_fraction_on():
    # 64 images an epoch and batches of 8: 32 steps.
    config = tiny_config(
        batch_size=8, epochs=4, logit__schedule='steps', logit__boundaries=(0.25, 0.62)
    )
    schedule = tiny_cohort(config).optimizers.logit.schedule
    assert schedule.changes == ((8, 0.1), (20, 0.1))
    np.testing.assert_allclose(
        rates(schedule, (0, 7, 8, 19, 20, 31)), [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3], rtol=1e-6
    )


def test_cosine_falls_to_zero_at_the_end_of_the_run():
    config = tiny_config(batch_size=8, epochs=4, logit__schedule='cosine')
    schedule = tiny_cohort(config).optimizers.logit.schedule
    expected = [0.1 * (1 + math.cos(math.pi * step / 32)) / 2 for step in (0, 8, 16, 31, 32)]
    np.testing.assert_allclose(rates(schedule, (0, 8, 16, 31, 32)), expected, atol=1e-8)


def test_two_boundaries_on_one_step_multiply():
    config = tiny_config(
        batch_size=64, epochs=2, logit__schedule='steps', logit__boundaries=(0.3, 0.4)
    )
    schedule = tiny_cohort(config).optimizers.logit.schedule
    assert schedule.changes == ((1, 0.1), (1, 0.1))
    np.testing.assert_allclose(rates(schedule, (0, 1)), [0.1, 1e-3], rtol=1e-6)


def test_constant_stays():
    config = tiny_config(logit__schedule='constant', logit__boundaries=(0.5,))
    assert rates(tiny_cohort(config).optimizers.logit.schedule, (0, 10**6)) == pytest.approx(
        [0.1] * 2
    )


def test_feature_and_discriminator_have_schedules_of_their_own():
    config = tiny_config(
        batch_size=8, epochs=4, feature__boundaries=(0.5,), discriminator__learning_rate=1e-3
    )
    used = tiny_cohort(config).optimizers.used()
    assert list(used) == ['logit', 'feature', 'discriminator']
    assert used['feature'].schedule.changes == ((16, 0.1),)
    assert used['discriminator'].schedule.initial == 1e-3


def test_sgd_with_momentum_and_decay_equals_the_formula():
    config = tiny_config(logit__schedule='constant', logit__weight_decay=0.01)
    rule = tiny_cohort(config).optimizers.logit
    w, v = np.array([1.0, -2.0]), np.zeros(2)
    params, memory = {'w': w.astype(np.float32)}, rule.init({'w': w.astype(np.float32)})
    for step, g in enumerate(([0.3, 0.1], [-0.2, 0.4], [0.0, 1.0])):
        gradient = {'w': np.array(g, np.float32)}
        params, memory = rule.apply(gradient, memory, params, step)
        v = 0.9 * v + (np.array(g) + 0.01 * w)
        w = w - 0.1 * v
        np.testing.assert_allclose(params['w'], w, rtol=1e-5)


@pytest.mark.parametrize('name', ['feature', 'discriminator'])
def test_adam_with_decay_equals_the_formula(name):
    config = tiny_config(
        **{
            f'{name}__learning_rate': 0.01,
            f'{name}__schedule': 'constant',
            f'{name}__weight_decay': 0.1,
        }
    )
    rule: optim.Optimizer = getattr(tiny_cohort(config).optimizers, name)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    params, memory = {'w': w.astype(np.float32)}, rule.init({'w': w.astype(np.float32)})
    for step, g in enumerate(([0.3, 0.1], [-0.2, 0.4], [0.0, 1.0])):
        gradient = {'w': np.array(g, np.float32)}
        params, memory = rule.apply(gradient, memory, params, step)
        g = np.array(g) + 0.1 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        t = step + 1
        w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(params['w'], w, rtol=1e-4)
