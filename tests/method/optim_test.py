"""Schedules, and the three optimizers against plain formulas."""

import math

import jax
import numpy as np
import optax
import pytest
from conftest import (
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.errors import UserError
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


GRADIENTS = ([0.3, 0.1], [-0.2, 0.4], [0.0, 1.0])


def trajectory(rule, gradients=GRADIENTS, start=(1.0, -2.0)):
    """Returns the parameters after each step: {'kernel': [2, 1], 'bias': [2]}, of equal entries."""
    w = np.array(start)
    params, path = {'kernel': w[:, None], 'bias': w}, []
    memory = rule.init(params)
    for step, g in enumerate(np.array(gradients)):
        params, memory = rule.apply({'kernel': g[:, None], 'bias': g}, memory, params, step)
        path.append(np.stack([params['kernel'][:, 0], params['bias']]))
    return np.array(path)


def logit_rule(**fields):
    fields = {f'logit__{name}': value for name, value in fields.items()}
    return tiny_cohort(tiny_config(logit__schedule='constant', **fields)).optimizers.logit


# name -> w, memory, gradient, step counted from 1 -> direction, memory; decay 0.1 and momentum 0.9
def nesterov(w, memory, g, t):
    g = g + 0.1 * w
    memory = 0.9 * memory + g
    return g + 0.9 * memory, memory


def adam(g, memory, t):
    m, v = memory if np.ndim(memory) else (0.0, 0.0)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    return (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), np.array([m, v])


def coupled_adam(w, memory, g, t):
    return adam(g + 0.1 * w, memory, t)


def adamw(w, memory, g, t):
    direction, memory = adam(g, memory, t)
    return direction + 0.1 * w, memory


def lion(w, memory, g, t):
    direction = np.sign(0.9 * memory + 0.1 * g) + 0.1 * w
    return direction, 0.99 * memory + 0.01 * g


RULES = {
    'nesterov': ({'nesterov': True}, nesterov),
    'adam': ({'rule': 'adam'}, coupled_adam),
    'adamw': ({'rule': 'adamw'}, adamw),
    'lion': ({'rule': 'lion'}, lion),
}


@pytest.mark.parametrize('name', RULES)
def test_rules_equal_numpy(name, x64):
    fields, rule = RULES[name]
    found = trajectory(logit_rule(weight_decay=0.1, learning_rate=0.01, **fields))
    w, memory = np.array([1.0, -2.0]), 0.0
    for t, g in enumerate(np.array(GRADIENTS), 1):
        direction, memory = rule(w, memory, g, t)
        w = w - 0.01 * direction
        np.testing.assert_allclose(found[t - 1], [w, w], rtol=1e-9)


@pytest.mark.parametrize(
    ('fields', 'ready_made'),
    [
        ({'rule': 'adamw'}, lambda mask: optax.adamw(0.1, weight_decay=0.01, mask=mask)),
        ({'rule': 'lion'}, lambda mask: optax.lion(0.1, b2=0.99, weight_decay=0.01, mask=mask)),
        ({'nesterov': True}, lambda mask: optax.chain(
            optax.add_decayed_weights(0.01, mask), optax.sgd(0.1, 0.9, nesterov=True))),
        ({'rule': 'adamw', 'nesterov': True}, lambda mask: optax.nadamw(
            0.1, weight_decay=0.01, mask=mask)),
    ],
)  # fmt: skip
@pytest.mark.parametrize('decay_all', [True, False])
def test_rules_are_optaxs(fields, ready_made, decay_all, x64):
    found = trajectory(logit_rule(weight_decay=0.01, decay_all=decay_all, **fields))
    mask = {'kernel': True, 'bias': decay_all}
    rule = ready_made(mask)
    w = np.array([1.0, -2.0])
    params = {'kernel': w[:, None], 'bias': w}
    state = rule.init(params)
    for row, g in zip(found, np.array(GRADIENTS), strict=True):
        updates, state = rule.update({'kernel': g[:, None], 'bias': g}, state, params)
        params = optax.apply_updates(params, updates)
        expected = [params['kernel'][:, 0], params['bias']]
        np.testing.assert_allclose(row, expected, rtol=1e-9)
    assert np.array_equal(found[-1][0], found[-1][1]) == decay_all


def test_clipping_scales_the_whole_gradient_before_weight_decay(x64):
    rule = logit_rule(clip_norm=0.5, weight_decay=0.1, momentum=0.0)
    found = trajectory(rule)
    w = np.array([1.0, -2.0])
    for row, g in zip(found, np.array(GRADIENTS), strict=True):
        norm = np.sqrt(2 * (g**2).sum())  # of kernel and bias
        w = w - 0.1 * (g * min(1, 0.5 / norm) + 0.1 * w)
        np.testing.assert_allclose(row[0], w, rtol=1e-9)


def test_the_rate_warms_up_linearly_and_then_follows_the_schedule():
    config = tiny_config(batch_size=8, epochs=4, logit__schedule='cosine', logit__warm_up=0.25)
    schedule = tiny_cohort(config).optimizers.logit.schedule
    steps = (0, 3, 7, 8, 16)
    cosine = [0.1 * (1 + math.cos(math.pi * step / 32)) / 2 for step in steps]
    expected = np.array(cosine) * [1 / 8, 4 / 8, 1, 1, 1]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-5)


def after_steps(config, batches, devices=1):
    """Returns the state, in double precision, and the last values."""
    devices = take_devices(devices)
    state = devices.replicate(as_float64(initial_state(config)))
    update = mapped_update(config, devices)
    for batch in batches:
        state, values = update(state, *map(devices.split, as_float64(batch)))
    return jax.device_get(state), values


def test_one_rate_and_decay_per_network_are_those_of_separate_runs(x64):
    fields = {'method': 'vanilla', 'batch_size': 8, 'epochs': 1}
    batches = [random_batch(8, seed) for seed in range(2)]
    both = {'logit__learning_rates': (0.1, 0.02), 'logit__weight_decays': (0.0, 0.1)}
    state, values = after_steps(tiny_config(**fields, **both), batches)
    for k, (rate, decay) in enumerate(zip(*both.values(), strict=True)):
        own = {'logit__learning_rate': rate, 'logit__weight_decay': decay}
        alone, _ = after_steps(tiny_config(**fields, **own), batches)
        difference, where = relative_difference(state.networks[k].params, alone.networks[k].params)
        assert difference < 1e-12, where
    np.testing.assert_allclose(values['learning_rate_logit'] / values['learning_rate_logit'][0],
                               [1, 0.2])  # fmt: skip


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'logit__learning_rates': (0.1,)}, r'config\.logit\.learning_rates: .* 2, or \(\), '),
        ({'logit__weight_decays': (0.1, 0.1), 'mesh__peer': 2}, r'config\.mesh\.peer: must be 1 w'),
    ],
)
def test_rates_that_do_not_fit_are_rejected(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_cohort(tiny_config(**fields))


@pytest.mark.slow
def test_two_accumulated_halves_are_one_batch(x64):
    # With local statistics a batch on two devices has the statistics of its halves; so all
    # optimizers, those of the discriminators too, see the same mean gradient.
    fields = {
        'batch_statistics': 'local',
        'logit__clip_norm': 0.1,
        'logit__schedule': 'constant',
        'feature__schedule': 'constant',
        'discriminator__schedule': 'constant',
        'epochs': 1,
    }
    whole = [random_batch(8, seed) for seed in range(2)]
    halves = [[part[i : i + 4] for part in batch] for batch in whole for i in (0, 4)]
    once, _ = after_steps(tiny_config(batch_size=8, **fields), whole, devices=2)
    twice = tiny_config(batch_size=4, accumulate=2, **fields)
    after, _ = after_steps(twice, halves)

    def params(state):
        return [part.params for part in (*state.networks, *state.discriminators)]

    difference, where = relative_difference(params(after), params(once))
    assert difference < 1e-9, where
    # In between nothing moves.
    odd, _ = after_steps(twice, halves[:3])
    even, _ = after_steps(twice, halves[:2])
    assert relative_difference(params(odd), params(even))[0] == 0
