"""Devices: their number and the mapping change nothing; one trace per run."""

import functools

import chex
import jax
import numpy as np
import pytest
from conftest import (
    PAIR,
    as_float64,
    initial_state,
    mapped_update,
    random_batch,
    relative_difference,
    take_devices,
    tiny_cohort,
    tiny_config,
)

from afkd_jax.data import dataset, pipelines
from afkd_jax.data.images import DeviceImages
from afkd_jax.devices.arrays import scalar_count
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED
from afkd_jax.devices.spmd import DATA
from afkd_jax.errors import UserError
from afkd_jax.method import metrics
from afkd_jax.method import state as state_lib
from afkd_jax.method import step as step_lib
from afkd_jax.tools import hlo, plan
from afkd_jax.training.run import Run

BATCH = 16
MIXED = ('tiny-4-2', 'tiny-6-1-drop')  # maps of two sizes, and dropout
FOUR = ('tiny-8-2-drop',) * 4
INFO = dataset.Info((8, 8, 1), tuple('0123456789'), 64, 0, 16)
# The adversary's switches, in three runs.
JOINT = {
    'discriminator__loss': 'hinge',
    'discriminator__norm': 'joint',
    'discriminator__condition': 'probabilities',
    'adversarial__balance': 'gradnorm',
    'adversarial__direction': 'better_only',
}
PENALTY = {
    'discriminator__norm': 'joint',
    'discriminator__r1': 1.0,
    'discriminator__r1_every': 2,
}
SPECTRAL = {
    'discriminator__norm': 'spectral',
    'discriminator__condition': 'label',
    'discriminator__input': 'patch',
    'discriminator__r1': 1.0,
    'discriminator__r1_every': 1,
    'adversarial__optimizer': 'logit',
    'adversarial__warm_up': 0.5,
    'accumulate': 2,
    'logit__clip_norm': 1.0,
}


def shapes_only_run(config, devices):
    return Run(config, INFO, devices, pipelines.shapes_only(config, INFO, devices))


@functools.cache
def after_three_steps(mapping, count, peers=1, networks=MIXED, method='afd', **fields):
    """Returns (state, sums) after three whole steps: gather, augment, learn, sum."""
    config = tiny_config(networks, batch_size=BATCH, method=method, **fields)
    devices = take_devices(count, mapping, peers)
    rng = np.random.default_rng(0)
    images = DeviceImages(
        pixels=rng.integers(0, 256, (64, 8, 8, 1), np.uint8),
        labels=rng.integers(0, 10, 64).astype(np.int32),
        mean=np.array([0.4]),
        std=np.array([0.3]),
    )
    run = shapes_only_run(config, devices)
    state = as_float64(initial_state(config))
    if peers > 1:
        state = jax.device_put(state.stack(), devices.shardings(run.layout.specs))
    else:
        state = devices.replicate(state)
    sums, images, key = devices.replicate(
        (
            as_float64(metrics.zeros(step_lib.value_shapes(run.cohort))),
            images,
            jax.random.key(1),
        )
    )
    for t in range(3):
        index = devices.split(np.arange(t * BATCH, (t + 1) * BATCH, dtype=np.int32))
        if t == 0:
            step = run.lowered_step(state, sums, images, index, key).compile()
        state, sums = step(state, sums, images, index, key)
    if peers > 1:
        check_each_device_has_its_own_networks(state, len(networks) // peers)
        state = jax.device_get(state).unstack()
    return jax.device_get((state, sums))


def check_each_device_has_its_own_networks(state, count):
    for leaf in jax.tree.leaves((state.networks, state.discriminators)):
        assert all(len(shard.data) == count for shard in leaf.addressable_shards)


@pytest.mark.parametrize(
    ('mapping', 'count'),
    [
        pytest.param('shard_map', 2, marks=pytest.mark.slow),
        ('shard_map', 8),
        pytest.param('pmap', 1, marks=pytest.mark.slow),
        ('pmap', 2),
    ],
)
def test_devices_and_mapping_change_nothing(mapping, count, x64):
    # In float32 rounding alone would differ by 2e-5 after one step, and grow from there.
    difference, where = relative_difference(
        after_three_steps(mapping, count), after_three_steps('shard_map', 1)
    )
    assert difference < 1e-9, where


@pytest.mark.parametrize(
    'method',
    [
        'one',
        *(
            pytest.param(method, marks=pytest.mark.slow)
            for method in (
                'shuffled+moments',
                'loo_mean',
                'kdcl_naive',
                'kdcl_minlogit',
                'kdcl_mean',
                'kdcl_linear',
                'kdcl_general',
                'okddip',
                'ffl+l1',
                'mcl+adversarial',
                'switokd+adversarial',
            )
        ),
    ],
)
def test_two_devices_change_nothing_in_a_method(method, x64):
    networks = MIXED if method.startswith('switokd') else (*MIXED, 'tiny-4-2')
    difference, where = relative_difference(
        *(
            after_three_steps('shard_map', count, networks=networks, method=method)
            for count in (2, 1)
        )
    )
    assert difference < 1e-9, where


@pytest.mark.slow
def test_sharding_a_pair_that_switches_changes_nothing(x64):
    difference, where = relative_difference(
        *(
            after_three_steps('shard_map', 2, peers, ('tiny-8-2',) * 2, 'switokd')
            for peers in (2, 1)
        )
    )
    assert difference < 1e-9, where


@pytest.mark.slow
def test_teaching_by_averages_does_not_depend_on_the_devices(x64):
    difference, where = relative_difference(
        *(
            after_three_steps(
                'shard_map', count, peers, FOUR[:2], 'afd', ema__decay=0.5, teacher='ema'
            )
            for count, peers in ((4, 2), (1, 1))
        )
    )
    assert difference < 1e-9, where


def test_own_views_do_not_depend_on_the_devices(x64):
    one, *others = (
        after_three_steps('shard_map', count, peers, ('tiny-8-2',) * 2, 'dml', data__views=views)
        for count, peers, views in ((1, 1, 'own'), (4, 2, 'own'), (1, 1, 'shared'))
    )
    difference, where = relative_difference(others[0], one)
    assert difference < 1e-9, where
    assert relative_difference(others[1], one)[0] > 1e-3


def test_own_views_without_augmentation_do_not_depend_on_the_devices(x64):
    fields = {'data__views': 'own', 'data__pad': 0, 'data__flip': False}
    difference, where = relative_difference(
        *(
            after_three_steps('shard_map', *how, ('tiny-8-2',) * 2, 'dml', **fields)
            for how in ((4, 2), (1, 1))
        )
    )
    assert difference < 1e-9, where


@pytest.mark.parametrize(
    ('peers', 'count', 'method'),
    [
        pytest.param(2, 2, 'afd', marks=pytest.mark.slow),
        pytest.param(4, 4, 'afd', marks=pytest.mark.slow),
        (2, 8, 'afd'),  # 2 x 4, two networks a device
        pytest.param(4, 8, 'l1_kd', marks=pytest.mark.slow),  # 4 x 2
        pytest.param(2, 4, 'dml', marks=pytest.mark.slow),  # one, two and three hops
        pytest.param(2, 4, 'loo_mean', marks=pytest.mark.slow),
        pytest.param(2, 4, 'shuffled+moments', marks=pytest.mark.slow),
    ],
)
def test_sharding_the_networks_changes_nothing(peers, count, method, x64):
    difference, where = relative_difference(
        after_three_steps('shard_map', count, peers, FOUR, method),
        after_three_steps('shard_map', 1, 1, FOUR, method),
    )
    assert difference < 1e-9, where


@pytest.mark.parametrize(
    ('mapping', 'count', 'peers', 'switches'),
    [
        ('shard_map', 4, 1, JOINT),
        pytest.param('shard_map', 4, 2, SPECTRAL, marks=pytest.mark.slow),
        pytest.param('shard_map', 4, 2, JOINT, marks=pytest.mark.slow),
        pytest.param('shard_map', 8, 1, SPECTRAL, marks=pytest.mark.slow),
        pytest.param('pmap', 2, 1, JOINT, marks=pytest.mark.slow),
        pytest.param('pmap', 2, 1, SPECTRAL, marks=pytest.mark.slow),
        pytest.param('shard_map', 4, 2, PENALTY, marks=pytest.mark.slow),
        pytest.param('pmap', 2, 1, PENALTY, marks=pytest.mark.slow),
    ],
)
def test_devices_change_nothing_with_the_adversarys_switches(mapping, count, peers, switches, x64):
    networks = 2 * ('tiny-8-2',) if peers > 1 else MIXED
    whole, sharded = (
        after_three_steps(*how, networks, 'afd', **switches)
        for how in (('shard_map', 1, 1), (mapping, count, peers))
    )
    difference, where = relative_difference(sharded, whole)
    assert difference < 1e-9, where


@pytest.mark.slow
def test_devices_change_nothing_with_maps_of_several_stages(x64):
    whole, sharded = (
        after_three_steps('shard_map', *how, 2 * ('staged-4',), 'afd', stages=2)
        for how in ((1, 1), (4, 2))
    )
    difference, where = relative_difference(sharded, whole)
    assert difference < 1e-9, where


def sent(method='afd', peers=1, count=8, networks=FOUR, **fields):
    """Returns {(operation, axis): Collective} of the compiled step, and the cohort."""
    config = tiny_config(networks, batch_size=BATCH, method=method, **fields)
    devices = take_devices(count, 'shard_map', peers)
    it = plan.Plan(config, INFO, devices)
    compiled = it.compile(BATCH)[0]
    rows = hlo.collectives(compiled, (devices.peers, devices.shards))
    return {(row.operation, row.axis): row for row in rows}, it.run(BATCH).cohort


def gradient_bytes(cohort, peers):
    state = state_lib.abstract(cohort)
    moved = sum(
        scalar_count([network.params[part] for part in parts])
        for network in state.networks
        for parts in cohort.updated_parts().values()
    )
    discriminators = scalar_count([discriminator.params for discriminator in state.discriminators])
    return 4 * (moved + discriminators) // peers


@pytest.mark.parametrize(('method', 'hops', 'maps'), [('afd', 1, 1), ('dml', 3, 0)])
def test_devices_exchange_gradients_and_the_rings_hops_only(method, hops, maps):
    # Without the norms' sums the whole program is known to the byte.
    found, cohort = sent(method, peers=4, batch_statistics='local')
    assert found.keys() == {
        ('all-reduce', 'data'),
        ('all-reduce', 'peer'),
        ('collective-permute', 'peer'),
    }
    gradients = found['all-reduce', 'data']
    statistics = 4 * 2 * 8  # running mean and variance of one norm of 8 channels
    # value_names and the accuracy; the norms of the gradients are of the sums.
    losses = 4 * (len(cohort.objective.value_names()) + 1)
    assert gradients.bytes == gradient_bytes(cohort, 4) + statistics + losses
    assert gradients.count == 1
    ring, shard = found['collective-permute', 'peer'], BATCH // 2
    assert ring.bytes == 4 * shard * (hops * 10 + maps * 4 * 4 * 8)  # logits, and maps of 4x4x8
    assert ring.count == hops + maps
    # The values to log, so that every device has those of all networks: a few numbers.
    values = len(step_lib.value_shapes(cohort)) - len(cohort.optimizers.used())
    assert found['all-reduce', 'peer'].bytes == 4 * 4 * values


def test_replicated_networks_exchange_their_gradients_only():
    found, cohort = sent(networks=PAIR, batch_statistics='local')
    assert found.keys() == {('all-reduce', 'data')}
    assert found['all-reduce', 'data'].bytes >= gradient_bytes(cohort, 1)
    assert found['all-reduce', 'data'].bytes < 1.1 * gradient_bytes(cohort, 1) + 1000


def test_the_global_statistics_cost_two_small_sums_per_norm():
    rows, _ = sent('vanilla', networks=PAIR)
    local, _ = sent('vanilla', networks=PAIR, batch_statistics='local')
    found, alone = rows['all-reduce', 'data'], local['all-reduce', 'data']
    # Forward mean and mean of squares, backward their cotangents, of one norm of 8 channels each;
    # but no running statistics.
    norms = 2
    assert found.bytes - alone.bytes == norms * 4 * 8 * (2 + 2 - 2)
    assert found.count <= alone.count + 2 * norms


def test_local_statistics_are_those_of_each_shard():
    # In the first step of plain SGD the mean over the shards' gradients is the mean over the
    # networks that each shard alone makes.
    config = tiny_config(method='vanilla', batch_size=BATCH, batch_statistics='local')
    images, labels = random_batch(BATCH)
    state = initial_state(config)

    def updated(count, *batch):
        devices = take_devices(count)
        batch = [devices.split(part) for part in batch]
        return jax.device_get(mapped_update(config, devices)(devices.replicate(state), *batch)[0])

    two, half = updated(2, images, labels), BATCH // 2
    parts = [updated(1, images[i : i + half], labels[i : i + half]) for i in (0, half)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *[part.networks for part in parts])
    difference, where = relative_difference(two.networks, mean)
    assert difference < 1e-5, where
    other, _ = relative_difference(two.networks, updated(1, images, labels).networks)
    assert other > 1e-3


@pytest.mark.parametrize('mapping', ['shard_map', 'pmap'])
def test_a_run_traces_its_step_once(mapping):
    config = tiny_config(method='kd_ring', batch_size=BATCH)
    devices = take_devices(2, mapping)
    cohort = tiny_cohort(config, DATA)

    @chex.assert_max_traces(n=1)
    def update(state, images, labels):
        return step_lib.update(cohort, state, images, labels, jax.random.key(0))

    chex.clear_trace_counter()
    mapped = devices.map(update, (REPLICATED, BATCH_SHARDED, BATCH_SHARDED), donate=(0,))
    state = devices.replicate(initial_state(config))
    for step in range(3):
        batch = (devices.split(part) for part in random_batch(BATCH, seed=step))
        state, _ = mapped(state, *batch)
    assert int(state.step) == 3
    larger = [devices.split(part) for part in random_batch(2 * BATCH)]
    with pytest.raises(AssertionError, match='traced > 1 times'):
        mapped(state, *larger)


def test_the_compiled_step_reuses_the_memory_of_its_state():
    config = tiny_config(method='vanilla', batch_size=BATCH)
    devices = take_devices(1)
    state = devices.replicate(initial_state(config))
    batch = (devices.split(part) for part in random_batch(BATCH))
    mapped_update(config, devices, donate=(0,))(state, *batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.networks))


def test_a_batch_that_does_not_divide_is_rejected():
    devices = take_devices(8)
    devices.check_divides('batch_size', 64)
    with pytest.raises(UserError, match=r'config\.batch_size: .* multiple of 8.* 60.*nearest: 64'):
        devices.check_divides('batch_size', 60)


@pytest.mark.parametrize('statistics', ['global', 'local'])
def test_only_with_local_statistics_does_the_run_depend_on_the_shards(statistics):
    config = tiny_config(batch_size=BATCH, batch_statistics=statistics)
    origins = [shapes_only_run(config, take_devices(count)).origin() for count in (2, 4)]
    assert (origins[0] != origins[1]) == (statistics == 'local')
