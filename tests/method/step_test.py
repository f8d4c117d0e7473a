"""The step: which parts each optimizer updates, and an independent derivation of all updates."""

import dataclasses
import functools

import flax.linen as nn
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
    take_devices,
    tiny_cohort,
    tiny_config,
)
from plain_step import as_memory, plain_sgd, plain_step

from afkd_jax.config import Data
from afkd_jax.data.images import DeviceImages
from afkd_jax.devices import arrays
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA
from afkd_jax.method import metrics, optim, presets
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.method.auxiliary import AUXILIARIES
from afkd_jax.models import layers
from afkd_jax.registry import NETWORKS, register_network

# Maps of 4x4x4, 8x8x6 and 3x3x4: the shared one is 3x3x6, and every network has a transfer layer.
TRIPLE = ('tiny-4-2', 'tiny-6-1', 'tiny-4-3')
# 4x4x4 and 4x4x6: only the first has one.
MIXED = ('tiny-4-2', 'tiny-6-2')
BATCH = 8


# method, networks, ring_order, logit teachers and map teacher of each network, from 0
DERIVED = [
    ('afd', TRIPLE, (), ([2], [0], [1]), (2, 0, 1)),
    ('afd', MIXED, (), ([1], [0]), (1, 0)),
    ('all+l1', TRIPLE, (1, 3, 2), ([1, 2], [0, 2], [0, 1]), (1, 2, 0)),
    ('l1', MIXED, (), ([], []), (1, 0)),
    ('dml', ('tiny-4-2', 'tiny-6-1', 'tiny-4-2'), (), ([1, 2], [0, 2], [0, 1]), (2, 0, 1)),
]


@pytest.mark.parametrize(('method', 'networks', 'order', 'logit_teachers', 'map_teachers'), DERIVED)
def test_two_steps_equal_an_independent_derivation(
    method, networks, order, logit_teachers, map_teachers, x64
):
    # Rates large enough to be seen; the second step has other rates, momentum and Adam's memory.
    config = tiny_config(
        networks,
        method=method,
        ring_order=order,
        epochs=1,
        batch_size=BATCH,  # 64 images an epoch: 1 / 8 of the run is one step
        loss__temperature=2.5,
        loss__kl_weight=0.7,
        loss__kl_ramp_up=0.5,
        loss__map_weight=0.3,
        loss__adversarial_weight=2.0,
        loss__label_smoothing=0.1,
        logit__schedule='steps',
        logit__boundaries=(1 / 8,),
        feature__learning_rate=1e-2,
        feature__boundaries=(1 / 8,),
        discriminator__learning_rate=3e-2,
        discriminator__boundaries=(1 / 8,),
    )
    state = as_float64(initial_state(config))
    memory = as_memory(state)
    devices = take_devices(1)
    update = mapped_update(config, devices)
    cohort = tiny_cohort(config)
    plain = jax.jit(
        functools.partial(plain_step, cohort, logit_teachers, map_teachers, cohort.method.maps)
    )
    state = devices.replicate(state)
    for t in (1, 2):
        images, labels = as_float64(random_batch(BATCH, seed=t))
        state, values = update(state, devices.split(images), devices.split(labels))
        shrink = 1.0 if t == 1 else 0.1
        loss = {
            'temperature': 2.5,
            'kl_weight': 0.7 * np.exp(-5 * (1 - (t - 1) / 4) ** 2),
            'map_weight': 0.3,
            'adversarial_weight': 2.0,
            'smoothing': 0.1,
            'logit_rate': 0.1 * shrink,
            'feature_rate': 1e-2 * shrink,
            'discriminator_rate': 3e-2 * shrink,
        }
        memory, losses = plain(loss, memory, jnp.asarray(images), jnp.asarray(labels), t)
    if method == 'afd':
        plain_losses = [own['discriminator'] for own in losses]
        np.testing.assert_allclose(values['discriminator'], plain_losses, rtol=1e-8)
    assert int(state.step) == 2
    difference, where = relative_difference(as_memory(state), memory)
    assert difference < 1e-8, where


@functools.cache
def states_in_turn(method):
    """Returns a mixed pair's states when the optimizers move in turn, one in each step."""
    config = tiny_config(MIXED, batch_size=BATCH, method=method)
    devices = take_devices(1)
    cohort = tiny_cohort(config, DATA)
    optimizers = cohort.optimizers
    for turn, (name, rule) in enumerate(optimizers.used().items()):
        rule = dataclasses.replace(
            rule, schedule=lambda step, turn=turn: jnp.where(step == turn, 0.1, 0.0)
        )
        optimizers = dataclasses.replace(optimizers, **{name: rule})
    cohort = dataclasses.replace(cohort, optimizers=optimizers)

    def one_step(state, images, labels):
        return step_lib.update(cohort, state, images, labels, jax.random.key(0))[0]

    update = devices.map(one_step, (REPLICATED, BATCH_SHARDED, BATCH_SHARDED))
    states = [initial_state(config)]
    batch = [devices.split(part) for part in random_batch(BATCH)]
    for _ in optimizers.used():
        states.append(jax.device_get(update(devices.replicate(states[-1]), *batch)))
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
    ('method', 'turn', 'movers'),
    [
        pytest.param('afd', 0, {'trunk', 'head'}, id='logit'),
        pytest.param('afd', 1, {'trunk', 'transfer'}, id='feature'),
        pytest.param('afd', 2, {'discriminator'}, id='discriminator'),
        pytest.param('l1_kd', 0, {'trunk', 'head', 'transfer'}, id='logit with l1'),
    ],
)
def test_each_optimizer_moves_its_own_parts_and_no_others(method, turn, movers):
    before, after = states_in_turn(method)[turn : turn + 2]
    assert before.networks[0].params['transfer'] is not None
    assert before.networks[1].params['transfer'] is None
    for k in range(2):
        old, new = before.networks[k].params, after.networks[k].params
        actual = {name: moved(old[name], new[name]) for name in old if old[name] is not None}
        if before.discriminators:
            discriminators = (state.discriminators[k].params for state in (before, after))
            actual['discriminator'] = moved(*discriminators)
        assert {name for name, has_moved in actual.items() if has_moved} == movers & actual.keys()


PARTS = {
    # optimizers of a network, transfer layers, discriminators, values
    'vanilla': ({'logit'}, False, 0, {'cross_entropy'}),
    'dml': ({'logit'}, False, 0, {'cross_entropy', 'mimicry_kl'}),
    'kd_ring': ({'logit'}, False, 0, {'cross_entropy', 'mimicry_kl'}),
    'l1': ({'logit'}, True, 0, {'cross_entropy', 'l1'}),
    'l1_kd': ({'logit'}, True, 0, {'cross_entropy', 'mimicry_kl', 'l1'}),
    'adversarial': (
        {'logit', 'feature'},
        True,
        1,
        {'cross_entropy', 'adversarial', 'discriminator', 'd_own', 'd_teacher'},
    ),
    'afd': (
        {'logit', 'feature'},
        True,
        1,
        {'cross_entropy', 'mimicry_kl', 'adversarial', 'discriminator', 'd_own', 'd_teacher'},
    ),
}
OTHER_PARTS = {
    'moments': ({'logit'}, True, 0, {'cross_entropy', 'moments'}),
    'switokd': (
        {'logit'},
        False,
        0,
        {'cross_entropy', 'mimicry_kl', 'l1_to_labels', 'l1_to_teacher', 'paused'},
    ),
    'kdcl_general': (
        {'logit'},
        False,
        0,
        {'cross_entropy', 'mimicry_kl', 'teacher_weight'},
    ),
    'mcl': ({'logit'}, False, 0, {'cross_entropy', 'contrastive', 'contrastive_kl'}),
}


@pytest.mark.parametrize(
    ('method', 'networks'),
    [(method, MIXED) for method in PARTS]
    + [
        pytest.param(method, MIXED if method == 'switokd' else TRIPLE, marks=pytest.mark.slow)
        for method in presets.PRESETS
    ],
)
def test_unused_parts_are_not_built(method, networks):
    parts = (PARTS | OTHER_PARTS).get(method, PARTS['dml'])
    optimizers, has_transfers, discriminators, losses = parts
    config = tiny_config(networks, method=method, batch_size=BATCH)
    devices = take_devices(1)
    state = initial_state(config)
    assert len(state.discriminators) == discriminators * len(networks)
    for network in state.networks:
        assert set(network.opt) == optimizers
        assert set(network.params) == {'trunk', 'head', 'transfer'}
    has_one = [network.params['transfer'] is not None for network in state.networks]
    assert has_one == ([has_transfers, False] if networks is MIXED else [has_transfers] * 3)

    batch = (devices.split(part) for part in random_batch(BATCH))
    after, values = mapped_update(config, devices)(devices.replicate(state), *batch)
    used = optimizers | ({'discriminator'} if discriminators else set())
    if state.auxiliary:
        if state.auxiliary.params:
            assert moved(state.auxiliary.params, jax.device_get(after).auxiliary.params)
        losses = losses | {*AUXILIARIES[method].step_names, 'grad_norm_auxiliary'}
    assert set(values) == losses | {'accuracy'} | {
        f'{kind}_{name}' for kind in ('grad_norm', 'learning_rate') for name in used
    }
    shapes = step_lib.value_shapes(tiny_cohort(config))
    assert {name: value.shape for name, value in values.items()} == shapes
    assert all(np.isfinite(value).all() for value in values.values())
    assert int(after.step) == 1
    for k, network in enumerate(jax.device_get(after).networks):
        assert moved(state.networks[k].params['head'], network.params['head'])


@pytest.mark.slow
def test_eight_networks_take_a_step():
    networks = tuple(f'tiny-{4 + k % 3}-2' for k in range(8))
    config = tiny_config(networks, ring_order=(8, 1, 3, 2, 4, 5, 7, 6), batch_size=BATCH)
    devices, state = take_devices(1), initial_state(config)
    batch = (devices.split(part) for part in random_batch(BATCH))
    after, values = mapped_update(config, devices)(devices.replicate(state), *batch)
    assert all(np.isfinite(value).all() for value in values.values())
    for old, new in zip(state.networks, jax.device_get(after).networks, strict=True):
        assert moved(old.params['trunk'], new.params['trunk'])
    for old, new in zip(state.discriminators, jax.device_get(after).discriminators, strict=True):
        assert moved(old.params, new.params)


def test_for_a_pair_learning_from_all_is_learning_from_the_ring():
    devices = take_devices(1)
    states = []
    for method in ('dml', 'kd_ring'):
        config = tiny_config(MIXED, method=method, batch_size=BATCH)
        state = devices.replicate(initial_state(config))
        batch = (devices.split(part) for part in random_batch(BATCH))
        states.append(mapped_update(config, devices)(state, *batch)[0])
    assert arrays.fingerprint(states[0]) == arrays.fingerprint(states[1])


def test_vanilla_costs_what_the_networks_cost_alone():
    # Counted by XLA: K steps of value_and_grad and SGD, one network each, against one of ours.
    config = tiny_config(('resnet8', 'resnet8'), method='vanilla', batch_size=BATCH)
    cohort, (images, labels) = tiny_cohort(config), random_batch(BATCH)
    state = state_lib.abstract(cohort)

    def plain(params, stats, velocity, images, labels):
        def loss(params):
            variables = {'params': params, 'batch_stats': stats}
            (logits, _), new = cohort.networks[0].apply(
                variables, images, True, mutable=['batch_stats']
            )
            entropy = -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()
            return entropy, new['batch_stats']

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        return *plain_sgd(gradient, params, velocity, 0.1, 0.9, 1e-4), stats

    params = state.networks[0].variables()['params']
    stats = state.networks[0].batch_stats['network']
    alone = jax.jit(plain).lower(params, stats, params, images, labels)
    ours = mapped_update(config, take_devices(1)).lower(state, images, labels)
    flops = [lowered.compile().cost_analysis()['flops'] for lowered in (alone, ours)]
    assert flops[1] < 1.05 * 2 * flops[0]


def test_learning_alone_does_not_see_the_other_network():
    config = tiny_config(method='vanilla', batch_size=BATCH)
    devices = take_devices(1)
    update = mapped_update(config, devices)
    state = initial_state(config)
    other = state.replace(networks=(state.networks[0], initial_state(config, 7).networks[1]))
    batch = [devices.split(part) for part in random_batch(BATCH)]
    one, _ = update(devices.replicate(state), *batch)
    two, _ = update(devices.replicate(other), *batch)
    assert relative_difference(one.networks[0], two.networks[0])[0] == 0
    assert relative_difference(one.networks[1], two.networks[1])[0] > 0


def test_dropout_differs_between_networks_and_steps():
    # Two equal networks on one batch: only their dropout distinguishes them.
    config = tiny_config(('tiny-8-2-drop', 'tiny-8-2-drop'), method='vanilla', batch_size=BATCH)
    cohort, state = tiny_cohort(config, DATA), initial_state(config)
    state = state.replace(networks=(state.networks[0],) * 2)
    devices = take_devices(1)

    def update(state, images, labels, key):
        return step_lib.update(cohort, state, images, labels, key)[1]['cross_entropy']

    mapped = devices.map(update, (REPLICATED, BATCH_SHARDED, BATCH_SHARDED, REPLICATED))
    batch = [devices.split(part) for part in random_batch(BATCH)]
    entropies = [
        float(entropy)
        for seed in (0, 1)
        for entropy in mapped(
            devices.replicate(state), *batch, devices.replicate(jax.random.key(seed))
        )
    ]
    assert len(set(entropies)) == 4


TRACES = []


class Traced(nn.Module):
    """A trunk that notes when it is traced."""

    networks: int
    layers: layers.Layers

    @nn.compact
    def __call__(self, images, train):
        TRACES.append(train)
        return self.layers.conv(4, (3, 3), 2, padding=1)(images)


def test_networks_of_one_architecture_are_traced_and_lowered_once(monkeypatch):
    monkeypatch.setattr(NETWORKS, '_patterns', list(NETWORKS._patterns))
    register_network(pattern='traced(.)')(lambda name, *parts: Traced(int(name[-1]), parts[0]))
    convolutions = []
    for networks in (2, 4):
        config = tiny_config((f'traced{networks}',) * networks)
        cohort, step = tiny_cohort(config), mapped_update(config, take_devices(1))
        TRACES.clear()
        state = state_lib.abstract(cohort)
        jax.eval_shape(functools.partial(state_lib.create, cohort), jax.random.key(0))
        assert TRACES == [False]
        TRACES.clear()
        program = step.lower(state, *random_batch(BATCH)).as_text()
        assert TRACES == [True]
        convolutions.append(program.count('stablehlo.convolution'))
    assert convolutions[0] == convolutions[1]  # also those of gradients and discriminators


@pytest.mark.parametrize(('pad', 'flip', 'differs'), [(2, True, True), (0, False, False)])
def test_the_same_images_are_augmented_anew_in_every_step(pad, flip, differs):
    # At learning rate 0 a batch's cross-entropy changes only with how its images are augmented.
    config = tiny_config(method='vanilla', batch_size=BATCH)
    cohort = tiny_cohort(config, DATA)
    still = dataclasses.replace(cohort.optimizers.logit, schedule=lambda step: jnp.float32(0))
    cohort = dataclasses.replace(cohort, optimizers=optim.Optimizers(still, None, None))
    devices = take_devices(1)
    step = devices.map(
        functools.partial(step_lib.train_step, cohort, Data(pad=pad, flip=flip)),
        specs=(REPLICATED, REPLICATED, REPLICATED, BATCH_SHARDED, REPLICATED),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
    images = DeviceImages(
        pixels=pixels, labels=random_batch(BATCH)[1], mean=np.float32([0.5]), std=np.float32([0.3])
    )
    state, zeros, images, key = devices.replicate(
        (
            initial_state(config),
            metrics.zeros(step_lib.value_shapes(cohort)),
            images,
            jax.random.key(0),
        )
    )
    index = devices.split(np.arange(BATCH, dtype=np.int32))
    entropies = []
    for _ in range(2):
        state, sums = step(state, zeros, images, index, key)
        entropies.append(metrics.means(sums)['cross_entropy'])
    assert (entropies[0] != entropies[1]) == differs
