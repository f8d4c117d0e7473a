"""The step: who moves, and an independent re-derivation of all that it does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    tiny_cohort,
    tiny_config,
)

from afkd_jax import parallel
from afkd_jax import step as step_lib

MIXED = ('resnet8', 'resnet8x2')  # 64 and 128 channels: the first has a transfer layer
TRIPLE = ('resnet8', 'resnet8-A', 'resnet8')
BATCH = 8


# --- The second way: the losses written out, jax.grad of each, plain SGD and Adam. ---


def plain_log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - jnp.log(jnp.exp(z).sum(-1, keepdims=True))


def plain_forward(cohort, k, params, stats, images):
    variables = {'params': params, 'batch_stats': stats}
    return cohort.networks[k].apply(variables, images, True, mutable=['batch_stats'])


def plain_map(cohort, k, transfer, stats, own_map):
    if cohort.transfers[k] is None:
        return own_map, None
    variables = {'params': transfer, 'batch_stats': stats}
    mapped, new = cohort.transfers[k].apply(variables, own_map, True, mutable=['batch_stats'])
    return mapped, new['batch_stats']


def plain_judge(cohort, k, params, maps):
    return cohort.discriminators[k].apply({'params': params}, maps, mutable=['batch_stats'])[0]


def plain_adam(gradient, params, m, v, t, rate):
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)

    def move(p, m, v):
        return p - rate * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

    return jax.tree.map(move, params, m, v), m, v


def plain_sgd(gradient, params, velocity, rate, momentum, decay):
    velocity = jax.tree.map(
        lambda v, g, p: momentum * v + g + decay * p, velocity, gradient, params
    )
    return jax.tree.map(lambda p, v: p - rate * v, params, velocity), velocity


def plain_step(cohort, memory, images, labels, t, rates, temperature):
    """Returns the memory after step t (counted from 1); per network a plain dict."""
    count = len(memory)
    seen = []
    for k, own in enumerate(memory):
        (logits, own_map), new = plain_forward(cohort, k, own['params'], own['stats'], images)
        mapped, mapped_stats = plain_map(cohort, k, own['transfer'], own['transfer_stats'], own_map)
        seen.append((logits, mapped, new['batch_stats'], mapped_stats))
    result = []
    for k, own in enumerate(memory):
        teacher = (k - 1 + count) % count
        teacher_logits, teacher_map = seen[teacher][0], seen[teacher][1]

        def logit_loss(params, k=k, own=own, teacher_logits=teacher_logits):
            (z, _), _ = plain_forward(cohort, k, params, own['stats'], images)
            entropy = -plain_log_softmax(z)[jnp.arange(len(labels)), labels].mean()
            log_q = plain_log_softmax(teacher_logits / temperature)
            log_p = plain_log_softmax(z / temperature)
            kl = (jnp.exp(log_q) * (log_q - log_p)).sum(-1).mean()
            return entropy + temperature**2 * kl

        def map_loss(moved, k=k, own=own):
            params = {'trunk': moved['trunk'], 'head': own['params']['head']}
            (_, own_map), _ = plain_forward(cohort, k, params, own['stats'], images)
            mapped, _ = plain_map(cohort, k, moved['transfer'], own['transfer_stats'], own_map)
            return ((1 - plain_judge(cohort, k, own['judge'], mapped)) ** 2).mean()

        def judge_loss(judge, k=k, own_map=seen[k][1], teacher_map=teacher_map):
            real = plain_judge(cohort, k, judge, teacher_map)
            fake = plain_judge(cohort, k, judge, own_map)
            return ((1 - real) ** 2).mean() + (fake**2).mean()

        moved = {'trunk': own['params']['trunk'], 'transfer': own['transfer']}
        by_logit = jax.grad(logit_loss)(own['params'])
        by_map = jax.grad(map_loss)(moved)
        by_judge = jax.grad(judge_loss)(own['judge'])

        params, velocity = plain_sgd(
            by_logit, own['params'], own['velocity'], rates['logit'], 0.9, 1e-4
        )
        moved = {'trunk': params['trunk'], 'transfer': own['transfer']}
        moved, m, v = plain_adam(by_map, moved, own['m'], own['v'], t, rates['feature'])
        judge, jm, jv = plain_adam(
            by_judge, own['judge'], own['jm'], own['jv'], t, rates['discriminator']
        )
        result.append(
            {
                'params': {'trunk': moved['trunk'], 'head': params['head']},
                'transfer': moved['transfer'],
                'judge': judge,
                'stats': seen[k][2],
                'transfer_stats': seen[k][3],
                'velocity': velocity,
                'm': m,
                'v': v,
                'jm': jm,
                'jv': jv,
            }
        )
    return result


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@pytest.mark.parametrize('networks', [MIXED, TRIPLE])
def test_two_steps_equal_an_independent_derivation(networks, x64):
    # Rates large enough to be seen; the second step has other rates, momentum and Adam's memory.
    config = tiny_config(
        networks,
        batch_size=BATCH,
        logit__schedule='steps',
        logit__boundaries=(1 / 8,),  # 64 images an epoch: after step 1
        feature__learning_rate=1e-2,
        feature__boundaries=(1 / 8,),
        discriminator__learning_rate=3e-2,
        discriminator__boundaries=(1 / 8,),
    )
    state = as_float64(initial_state(config))
    memory = []
    for network, judge in zip(state.networks, state.discriminators, strict=True):
        moved = {'trunk': network.params['trunk'], 'transfer': network.transfer}
        memory.append(
            {
                'params': network.params,
                'transfer': network.transfer,
                'judge': judge.params,
                'stats': network.batch_stats['network'],
                'transfer_stats': network.batch_stats['transfer'],
                'velocity': zeros_like(network.params),
                'm': zeros_like(moved),
                'v': zeros_like(moved),
                'jm': zeros_like(judge.params),
                'jv': zeros_like(judge.params),
            }
        )
    devices = parallel.Devices.local('shard_map', 1)
    update = mapped_update(config, devices)
    plain_cohort = tiny_cohort(config)
    plain = jax.jit(functools.partial(plain_step, plain_cohort, temperature=3.0))
    state = devices.replicate(state)
    for t in (1, 2):
        images, labels = as_float64(random_batch(BATCH, seed=t))
        state, _ = update(state, devices.split(images), devices.split(labels))
        shrink = 1.0 if t == 1 else 0.1
        rates = {'logit': 0.1 * shrink, 'feature': 1e-2 * shrink, 'discriminator': 3e-2 * shrink}
        memory = plain(memory, jnp.asarray(images), jnp.asarray(labels), t, rates)
    assert int(state.step) == 2
    for network, judge, expected in zip(state.networks, state.discriminators, memory, strict=True):
        actual = {
            'params': network.params,
            'transfer': network.transfer,
            'judge': judge.params,
            'stats': network.batch_stats['network'],
            'transfer_stats': network.batch_stats['transfer'],
            'velocity': network.logit_opt[1].trace,
            'm': network.feature_opt[1].mu,
            'v': network.feature_opt[1].nu,
            'jm': judge.opt[1].mu,
            'jv': judge.opt[1].nu,
        }
        difference, where = relative_difference(actual, expected)
        assert difference < 1e-8, where


@functools.cache
def states_by_turns():
    """Returns a mixed pair's states when the three optimizers move in turn, one in each step."""
    config = tiny_config(MIXED, batch_size=BATCH)
    devices = parallel.Devices.local('shard_map', 1)
    cohort = tiny_cohort(config, parallel.AXIS)
    optimizers = cohort.optimizers
    for turn, (name, rule) in enumerate(optimizers.used().items()):
        rule = dataclasses.replace(
            rule, schedule=lambda step, turn=turn: jnp.where(step == turn, 0.1, 0.0)
        )
        optimizers = dataclasses.replace(optimizers, **{name: rule})
    cohort = dataclasses.replace(cohort, optimizers=optimizers)
    update = devices.map(functools.partial(step_lib.update, cohort), (False, True, True))
    states = [initial_state(config)]
    batch = [devices.split(part) for part in random_batch(BATCH)]
    for _ in range(3):
        states.append(jax.device_get(update(devices.replicate(states[-1]), *batch)[0]))
    return states


def moved(before, after):
    """Returns whether every array of a tree, or none, has changed; anything else fails."""
    changed = {
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    }
    assert len(changed) == 1
    return changed.pop()


@pytest.mark.parametrize(
    ('turn', 'movers'),
    [
        pytest.param(0, {'trunk', 'head'}, id='logit'),
        pytest.param(1, {'trunk', 'transfer'}, id='feature'),
        pytest.param(2, {'discriminator'}, id='discriminator'),
    ],
)
def test_each_loss_moves_its_own_parties_and_nobody_else(turn, movers):
    before, after = states_by_turns()[turn : turn + 2]
    for k in range(2):
        old, new = before.networks[k], after.networks[k]
        actual = {
            'trunk': moved(old.params['trunk'], new.params['trunk']),
            'head': moved(old.params['head'], new.params['head']),
            'discriminator': moved(before.discriminators[k].params, after.discriminators[k].params),
        }
        if old.transfer is not None:
            actual['transfer'] = moved(old.transfer, new.transfer)
        assert {name for name, has_moved in actual.items() if has_moved} == movers & actual.keys()
    assert before.networks[0].transfer is not None
    assert before.networks[1].transfer is None


def test_without_a_method_that_teaches_there_is_nothing_but_networks():
    config = tiny_config(method='vanilla')
    state = initial_state(config)
    assert state.discriminators == ()
    assert all(network.feature_opt is None for network in state.networks)
    assert set(step_lib.value_shapes(tiny_cohort(config))) == {
        'cross_entropy',
        'accuracy',
        'grad_norm_logit',
        'learning_rate_logit',
    }


@pytest.mark.parametrize('method', ['vanilla', 'kd_ring', 'adversarial', 'afd'])
def test_a_step_reports_what_it_announces(method):
    config = tiny_config(method=method, batch_size=BATCH)
    devices = parallel.Devices.local('shard_map', 1)
    state = devices.replicate(initial_state(config))
    batch = (devices.split(part) for part in random_batch(BATCH))
    _, values = mapped_update(config, devices)(state, *batch)
    announced = step_lib.value_shapes(tiny_cohort(config))
    assert {name: value.shape for name, value in values.items()} == announced
    assert all(np.isfinite(value).all() for value in values.values())


def test_learning_alone_does_not_see_the_other_network():
    config = tiny_config(method='vanilla', batch_size=BATCH)
    devices = parallel.Devices.local('shard_map', 1)
    update = mapped_update(config, devices)
    state = initial_state(config)
    other = state.replace(networks=(state.networks[0], initial_state(config, 7).networks[1]))
    batch = [devices.split(part) for part in random_batch(BATCH)]
    one, _ = update(devices.replicate(state), *batch)
    two, _ = update(devices.replicate(other), *batch)
    assert relative_difference(one.networks[0], two.networks[0])[0] == 0
    assert relative_difference(one.networks[1], two.networks[1])[0] > 0
