"""Averages of the networks: their recursion in NumPy, and what teaches."""

import functools

import jax
import numpy as np
import pytest
from conftest import (
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    softmax,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.errors import UserError
from afkd_jax.method import state as state_lib
from afkd_jax.tools import describe

# The second network has a map of more channels: the first has a transfer layer.
PAIR = ('tiny-4-2', 'tiny-6-2')


def states_of(config, steps=3):
    """Returns the states after 0 .. `steps` steps, in the precision of the test, and values."""
    devices = take_devices(1)
    state, found = as_float64(initial_state(config)), []
    states = [state]
    for t in range(steps):
        batch = [devices.split(part) for part in as_float64(random_batch(8, seed=t))]
        state, values = mapped_update(config, devices)(devices.replicate(state), *batch)
        states.append(jax.device_get(state))
        found.append(jax.device_get(values))
    return states, found


def weights(network):
    return {'params': network.params, 'batch_stats': network.batch_stats}


@pytest.mark.slow
@pytest.mark.parametrize('decay', [0.6, 0.9])
def test_averages_equal_their_recursion(decay, x64):
    states, _ = states_of(tiny_config(PAIR, method='afd', ema__decay=decay))
    for k in range(2):
        average = weights(states[0].networks[k])
        for t, state in enumerate(states[1:], 1):
            d = min(1 - 1 / t, decay)
            average = jax.tree.map(
                lambda a, new, d=d: d * np.asarray(a, np.float64) + (1 - d) * np.asarray(new),
                average,
                weights(state.networks[k]),
            )
            # The decay of a step is in single precision.
            assert relative_difference(state.networks[k].ema, average)[0] < 1e-6
        averaged = state_lib.averaged(states[-1].networks)[k]
        assert relative_difference(weights(averaged), average)[0] < 1e-6
        assert relative_difference(weights(averaged), weights(states[-1].networks[k]))[0] > 1e-3


def test_averages_change_no_bit_of_the_networks():
    with_averages, _ = states_of(tiny_config(PAIR, method='l1_kd', ema__decay=0.9))
    without, _ = states_of(tiny_config(PAIR, method='l1_kd'))
    assert without[-1].networks[0].ema is None
    for one, other in zip(with_averages[-1].networks, without[-1].networks, strict=True):
        assert relative_difference(one.replace(ema=None), other)[0] == 0


@functools.cache
def second_step(method):
    """Returns (state before, values) of a second step that the averages teach."""
    states, values = states_of(tiny_config(PAIR, method=method, ema__decay=0.9, teacher='ema'), 2)
    return states[1].replace(networks=tuple(_other(n) for n in states[1].networks)), values


def _other(network):
    """Returns the network with other averages, so that nothing takes its weights for them."""
    return network.replace(ema=jax.tree.map(lambda leaf: leaf * 1.5 + 0.1, network.ema))


def taught(method):
    """Returns logits and maps of the averages, in evaluation mode, and the values of a step."""
    config = tiny_config(PAIR, method=method, ema__decay=0.9, teacher='ema')
    before, _ = second_step(method)
    devices, cohort = take_devices(1), tiny_cohort(config)
    images, labels = random_batch(8, seed=9)
    _, values = mapped_update(config, devices)(
        devices.replicate(before), devices.split(images), devices.split(labels)
    )
    outputs = []
    for k, network in enumerate(before.networks):
        params, stats = network.ema['params'], network.ema['batch_stats']
        variables = {
            'params': {name: params[name] for name in ('trunk', 'head')},
            'batch_stats': stats['network'],
        }
        logits, maps = cohort.networks[k].apply(variables, images, False)
        if module := cohort.transfers[k]:
            variables = {'params': params['transfer'], 'batch_stats': stats['transfer']}
            maps = module.apply(variables, maps, False)
        outputs.append((np.asarray(logits), np.asarray(maps)))
    own = [
        module.apply(network.variables(), images, True, mutable=['batch_stats'])[0]
        for module, network in zip(cohort.networks, before.networks, strict=True)
    ]
    return outputs, own, jax.device_get(values), before, cohort


@pytest.mark.parametrize('method', ['all+l1', 'afd'])
def test_the_averages_teach_logits_and_maps(method):
    outputs, own, values, before, cohort = taught(method)
    for k in range(2):
        teacher_logits, teacher_map = outputs[1 - k]
        p, q = (softmax(np.float64(z) / 3) for z in (own[k][0], teacher_logits))
        kl = 9 * (q * np.log(q / p)).sum(-1).mean()
        np.testing.assert_allclose(values['mimicry_kl'][k], kl, rtol=1e-4)
        if method == 'afd':
            discriminator = {'params': before.discriminators[k].params}
            outputs_B, _ = cohort.discriminators[k].apply(
                discriminator, teacher_map, mutable=['batch_stats']
            )
            np.testing.assert_allclose(values['d_teacher'][k], outputs_B.mean(), rtol=1e-5)
    if method == 'all+l1':  # the second network has no transfer layer
        l1 = np.abs(np.asarray(own[1][1]) - outputs[0][1]).mean()
        np.testing.assert_allclose(values['l1'][1], l1, rtol=1e-4)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'teacher': 'ema'}, r"config\.ema\.decay: must be above 0 where config\.teacher is 'ema'"),
        *(
            (
                {'teacher': 'ema', 'ema__decay': 0.9, 'method': method},
                rf"config\.teacher: must be 'live' with the method \"{method}\"",
            )
            for method in ('vanilla', 'one', 'shuffled', 'switokd')
        ),
    ],
    ids=str,
)
def test_what_averages_cannot_teach_is_rejected(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_cohort(tiny_config(**fields))


def test_a_frozen_network_has_no_average():
    config = tiny_config(
        method='afd', ema__decay=0.9, teacher='ema', frozen=(1,), init_from=('a:1', '')
    )
    state = initial_state(config)
    assert [network.ema is None for network in state.networks] == [True, False]
    devices = take_devices(1)
    batch = (devices.split(part) for part in random_batch(8))
    _, values = mapped_update(config, devices)(devices.replicate(state), *batch)
    assert all(np.isfinite(value).all() for value in values.values())


def test_averages_are_described():
    facts = describe.describe(tiny_config(method='afd', ema__decay=0.99, teacher='ema'))
    assert (facts['teacher'], facts['ema_decay']) == ('ema', 0.99)
    assert 'with decay up to 0.99, is evaluated, and teaches' in describe.text(facts)
