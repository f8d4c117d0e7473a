"""Frozen networks: they only teach, and do not change by a bit."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import (
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.devices.arrays import scalar_count
from afkd_jax.errors import UserError
from afkd_jax.method import state as state_lib
from afkd_jax.registry import register_network

FROZEN = {'frozen': (1,), 'init_from': ('runs/a:1', '')}


def one_step(config, state=None, devices=1):
    state = initial_state(config) if state is None else state
    state, values = mapped_update(config, take_devices(devices))(state, *random_batch(12))
    return jax.device_get((state, values))


@pytest.mark.parametrize('fields', [{}, {'batch_statistics': 'local'}], ids=str)
@pytest.mark.parametrize('method', ['afd', 'all+l1'])
def test_a_frozen_network_does_not_change_by_a_bit(method, fields):
    config = tiny_config(method=method, **FROZEN, **fields)
    before = initial_state(config)
    after, values = one_step(config, devices=3 if fields else 1)
    jax.tree.map(np.testing.assert_array_equal, before.networks[0], after.networks[0])
    assert before.networks[0].opt == {}
    assert relative_difference(after.networks[1].params, before.networks[1].params)[0] > 1e-6
    assert all(np.isfinite(value).all() for value in values.values())
    for name, value in values.items():
        if value.ndim and name not in ('cross_entropy', 'accuracy'):
            assert value[0] == 0
            assert value[1] > 0
    if method == 'afd':
        assert after.discriminators[0] is None


def test_it_teaches_as_the_same_network_in_evaluation_mode_would():
    """The student's losses are those to the logits and maps of evaluation mode, by hand."""
    config = tiny_config(method='l1_kd', **FROZEN)
    state, cohort = initial_state(config), tiny_cohort(config)
    images, _ = random_batch(12)
    _, values = one_step(config)
    teacher = cohort.networks[0].apply(state.networks[0].variables(), images, False)
    own, _ = cohort.networks[1].apply(
        state.networks[1].variables(), images, True, mutable=['batch_stats']
    )

    def log_softmax(z):
        z = np.asarray(z, np.float64) / config.loss.temperature
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = log_softmax(own[0]), log_softmax(teacher[0])
    kl = config.loss.temperature**2 * (np.exp(q) * (q - p)).sum(-1).mean()
    np.testing.assert_allclose(values['mimicry_kl'][1], kl, rtol=1e-4)
    l1 = np.abs(np.asarray(own[1], np.float64) - np.asarray(teacher[1], np.float64)).mean()
    np.testing.assert_allclose(values['l1'][1], l1, rtol=1e-4)


class Bare(nn.Module):
    """A convolution and a ReLU, without a norm: training mode is evaluation mode."""

    layers: Any

    @nn.compact
    def __call__(self, images, train):
        return nn.relu(self.layers.conv(4, (3, 3), 2, padding=1)(images))


@register_network(pattern='bare')
def bare(name, layers, large):
    return Bare(layers)


def test_a_teacher_that_equals_the_student_gives_no_kl():
    config = tiny_config(('bare', 'bare'), method='kd_ring', **FROZEN)
    cohort = tiny_cohort(config)
    first = state_lib.create(cohort, jax.random.key(0)).networks[0].variables()
    state = jax.device_get(state_lib.create(cohort, jax.random.key(0), {1: first}))
    _, values = one_step(config, state)
    assert values['cross_entropy'][0] == values['cross_entropy'][1]
    assert abs(values['mimicry_kl'][1]) < 1e-9
    _, values = one_step(config)  # not the teacher's weights
    assert values['mimicry_kl'][1] > 1e-3


def test_its_map_is_used_as_it_is_and_the_student_is_brought_to_it():
    config = tiny_config(('tiny-4-1', 'tiny-8-2'), method='afd', **FROZEN)
    cohort = tiny_cohort(config)
    assert cohort.shared_map == (4, 4, 4)
    assert scalar_count(initial_state(config).networks[0].params['transfer']) == 0
    assert scalar_count(initial_state(config).networks[1].params['transfer']) > 0
    with pytest.raises(UserError, match=r'config\.frozen: .* equally many channels, but have'):
        tiny_cohort(
            tiny_config(
                ('tiny-4-1', 'tiny-8-2', 'tiny-8-2'), frozen=(1, 2), init_from=('a:1', 'b:1', '')
            )
        )


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        ({'init_from': ('a:1',)}, r'init_from: must be one string per network, that is 2, or \(\)'),
        ({**FROZEN, 'frozen': (3,)}, r'frozen: must be numbers of networks, in 1 \.\. 2'),
        ({'frozen': (1, 2), 'init_from': ('a:1', 'b:1')}, 'one at least must learn'),
        ({**FROZEN, 'frozen': (2,)}, r'network 2 \(tiny-8-2\) is frozen and needs trained weights'),
        ({**FROZEN, 'mesh__peer': 2}, r'mesh\.peer: must be 1 with a frozen network'),
    ],
    ids=str,
)
def test_wrong_fields(fields, words):
    with pytest.raises(UserError, match=words):
        tiny_cohort(tiny_config(**fields))
