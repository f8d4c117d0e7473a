"""Cohorts: where there is a transfer layer, what is rejected, the ring."""

import jax
import pytest
from conftest import tiny_cohort, tiny_config

from afkd_jax.config import Config
from afkd_jax.devices.arrays import scalar_count
from afkd_jax.errors import UserError
from afkd_jax.method import cohort as cohort_lib
from afkd_jax.method import state as state_lib


@pytest.mark.parametrize(
    ('networks', 'shared', 'parameters'),
    [
        # Parameters of each transfer layer: None where there is none, 0 where it only pools.
        (('tiny-4-2', 'tiny-4-2'), (4, 4, 4), (None, None)),
        (('tiny-4-2', 'tiny-6-2'), (4, 4, 6), (4 * 6 + 12, None)),
        (('tiny-4-1', 'tiny-4-2'), (4, 4, 4), (0, None)),
        (('tiny-6-1', 'tiny-4-2'), (4, 4, 6), (0, 4 * 6 + 12)),
        (('tiny-4-2', 'tiny-6-1', 'tiny-4-3'), (3, 3, 6), (36, 0, 36)),
    ],
)
@pytest.mark.parametrize('method', ['afd', 'l1'])
def test_a_transfer_layer_exists_exactly_where_shapes_differ(networks, shared, parameters, method):
    cohort = tiny_cohort(tiny_config(networks, method=method))
    assert cohort.shared_map == shared
    layers = [network.params['transfer'] for network in state_lib.abstract(cohort).networks]
    counts = [None if layer is None else scalar_count(layer) for layer in layers]
    assert tuple(counts) == parameters


def test_where_no_maps_are_compared_there_is_none():
    cohort = tiny_cohort(tiny_config(('tiny-4-2', 'tiny-6-1'), method='dml'))
    assert cohort.transfers == (None, None)
    assert cohort.shared_map is None


def test_a_cohort_of_three_families_and_one_of_eight_networks():
    config = Config().replace(networks=('resnet32', 'wrn-16-2', 'mobilenet_v2'))
    cohort = cohort_lib.assemble(config, (32, 32, 3), 100, 50_000)
    assert cohort.map_shapes == ((8, 8, 64), (8, 8, 128), (4, 4, 1280))
    assert cohort.shared_map == (4, 4, 1280)
    assert [transfer is None for transfer in cohort.transfers] == [False, False, True]
    config = tiny_config(
        tuple(f'tiny-{4 + k}-2' for k in range(8)), ring_order=(8, 1, 3, 2, 4, 5, 7, 6)
    )
    cohort = tiny_cohort(config)
    assert len(state_lib.abstract(cohort).discriminators) == 8
    assert [cohort.ring.teacher_of(k) + 1 for k in range(8)] == [8, 3, 1, 2, 4, 7, 5, 6]


def test_networks_of_one_name_start_from_different_seeds():
    cohort = tiny_cohort(tiny_config(('tiny-4-2',) * 3))
    networks = state_lib.create(cohort, jax.random.key(0)).networks
    kernels = {network.params['trunk']['Conv_0']['kernel'].tobytes() for network in networks}
    assert len(kernels) == 3


@pytest.mark.parametrize('order', [(1, 2), (1, 2, 2), (0, 1, 2), (1, 2, 4), (1, 2, 3, 1)])
def test_an_order_that_is_no_ring_is_rejected(order):
    with pytest.raises(
        UserError, match=r'config.ring_order: must name each .* 1 .. 3 once, as in'
    ) as e:
        tiny_cohort(tiny_config(('tiny-4-2',) * 3, ring_order=order))
    assert str(order) in str(e.value)


@pytest.mark.parametrize(
    ('networks', 'method', 'message'),
    [
        (('resnet8', 'vgg8'), 'afd', '"vgg8".*1x1, too small for a discriminator; at least 2x2'),
        (('mobilenet_v2', 'resnet8'), 'adversarial', '"mobilenet_v2".*1x1'),
    ],
)
def test_images_too_small_for_a_discriminator_are_rejected(networks, method, message):
    with pytest.raises(UserError, match=f'images of 8x8 are too small for {message}'):
        tiny_cohort(tiny_config(networks, method=method))
    assert tiny_cohort(tiny_config(networks, method='l1_kd')).shared_map[:2] == (1, 1)


def test_sharded_networks_are_in_the_ring_as_listed():
    networks = ('tiny-4-2',) * 4
    cohort = tiny_cohort(tiny_config(networks, ring_order=(1, 2, 3, 4)), peers=2)
    assert len(cohort.local.networks) == len(cohort.local.discriminators) == 2
    with pytest.raises(UserError, match=r'config.ring_order: must be \(\) where config.mesh.peer'):
        tiny_cohort(tiny_config(networks, ring_order=(1, 3, 2, 4)), peers=2)
