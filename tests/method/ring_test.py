"""The ring: which network teaches which."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import take_devices

from afkd_jax.devices.mesh import PEER_SHARDED, REPLICATED
from afkd_jax.method.ring import Ring


def listed(networks):
    return Ring(tuple(range(networks)))


@pytest.mark.parametrize('order', [(0, 1), (0, 1, 2), (2, 0, 3, 1), tuple(range(8))])
def test_k_hops_round_the_ring_are_the_identity(order):
    own = np.random.default_rng(0).standard_normal((len(order), 4, 3)).astype(np.float32)
    ring, moved = Ring(order), own
    for hop in range(len(order)):
        assert hop == 0 or not np.array_equal(moved, own)
        np.testing.assert_array_equal(ring.teachers(own, hop), moved)
        moved = np.asarray(ring.teachers(moved))
    np.testing.assert_array_equal(moved, own)


def test_three_networks_are_the_drawing():
    # teacher 1 -> student 2, 2 -> 3, 3 -> 1
    assert listed(3).teachers(jnp.array([1, 2, 3])).tolist() == [3, 1, 2]
    assert [listed(3).teacher_of(k) + 1 for k in range(3)] == [3, 1, 2]


def test_two_networks_teach_each_other():
    assert listed(2).teachers(jnp.array([10, 20])).tolist() == [20, 10]


def test_an_order_of_its_own():
    # 1 teaches 3, 3 teaches 4, 4 teaches 2, 2 teaches 1
    assert Ring((0, 2, 3, 1)).teachers(jnp.array([1, 2, 3, 4])).tolist() == [2, 4, 1, 3]


@pytest.mark.parametrize('order', [(0, 1), (2, 0, 1), (6, 5, 4, 0, 1, 2, 3)])
@pytest.mark.parametrize('hops', [1, 2])
def test_teacher_of_names_the_network_that_the_roll_brings(order, hops):
    ring, networks = Ring(order), len(order)
    rolled = ring.teachers(jnp.arange(networks), hops).tolist()
    assert rolled == [ring.teacher_of(k, hops) for k in range(networks)]


@pytest.mark.parametrize('order', [(0, 1, 2), (1, 0, 2)])
def test_no_gradient_reaches_a_teacher(order):
    own = jnp.arange(6.0).reshape(3, 2)
    gradient = jax.grad(lambda x: (Ring(order).teachers(x) ** 2).sum())(own)
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))


def unstable_from(teachers, momentum=0.9):
    """Returns the rate times curvature from which heavy-ball mimicry of the teachers diverges.

    In a linear model network k moves by v_k <- momentum v_k + (z_k - mean of its teachers' z),
    z_k <- z_k - rate v_k. A mode of eigenvalue a has the roots of
    r^2 - (1 + momentum - rate a) r + momentum.
    """
    pull = np.eye(len(teachers))
    for k, own in enumerate(teachers):
        pull[k, own] -= 1 / len(own)
    modes = np.linalg.eigvals(pull)
    for rate in np.geomspace(1e-3, 5, 2000):
        for a in modes:
            if max(abs(np.roots([1, -(1 + momentum - rate * a), momentum]))) > 1 + 1e-9:
                return rate
    return np.inf


def test_a_ring_of_three_is_far_less_stable_under_momentum_than_a_pair():
    # The figures of docs/results.md, "Rings of three networks".
    def ring(networks):
        return [[listed(networks).teacher_of(k)] for k in range(networks)]

    everyone = [[1, 2], [0, 2], [0, 1]]
    assert unstable_from(ring(2)) == pytest.approx(1.9, rel=0.01)
    assert unstable_from(everyone) == pytest.approx(2.53, rel=0.01)
    assert unstable_from(ring(3)) == pytest.approx(0.021, rel=0.02)
    assert unstable_from(ring(4)) == pytest.approx(0.0105, rel=0.02)
    assert unstable_from(ring(8)) == pytest.approx(0.0062, rel=0.02)
    for networks in (2, 3, 8):
        assert unstable_from(ring(networks), momentum=0) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(('networks', 'peers'), [(2, 2), (4, 2), (6, 3), (8, 8), (8, 4), (6, 2)])
def test_a_ring_over_devices_is_the_roll(networks, peers):
    own_KxC = np.random.default_rng(0).standard_normal((networks, 3)).astype(np.float32)
    devices, ring = take_devices(peers, 'shard_map', peers), listed(networks)
    over = dataclasses.replace(ring, peers=peers)

    def per_device(own_LxC):
        moved = [over.teachers(own_LxC, hops) for hops in range(1, networks)]
        index_L = over.first(len(own_LxC)) + jnp.arange(len(own_LxC))
        values = over.gathered({'sum': own_LxC.sum(1), 'first': own_LxC[:, 0]})
        return moved, index_L, values, over.logsumexp(100 * own_LxC)

    out = PEER_SHARDED, PEER_SHARDED, REPLICATED, REPLICATED
    mapped = devices.map(per_device, specs=(PEER_SHARDED,), out=out)
    moved, index_K, values, largest_C = mapped(own_KxC)
    for hops, got in enumerate(moved, start=1):
        np.testing.assert_array_equal(got, ring.teachers(own_KxC, hops))
    assert index_K.tolist() == list(range(networks))
    np.testing.assert_allclose(values['sum'], own_KxC.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(values['first'], own_KxC[:, 0])
    np.testing.assert_allclose(largest_C, jax.nn.logsumexp(100 * own_KxC, 0), rtol=1e-6)
