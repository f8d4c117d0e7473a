"""The ring: who teaches whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afkd_jax.ring import Ring


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
    # teacher 1 -> pupil 2, 2 -> 3, 3 -> 1
    assert listed(3).teachers(jnp.array([1, 2, 3])).tolist() == [3, 1, 2]
    assert [listed(3).teacher_of(k) + 1 for k in range(3)] == [3, 1, 2]


def test_two_networks_teach_each_other():
    assert listed(2).teachers(jnp.array([10, 20])).tolist() == [20, 10]


def test_an_order_of_its_own():
    # 1 teaches 3, 3 teaches 4, 4 teaches 2, 2 teaches 1
    assert Ring((0, 2, 3, 1)).teachers(jnp.array([1, 2, 3, 4])).tolist() == [2, 4, 1, 3]


@pytest.mark.parametrize('order', [(0, 1), (2, 0, 1), (6, 5, 4, 0, 1, 2, 3)])
@pytest.mark.parametrize('hops', [1, 2])
def test_teacher_of_names_whom_the_roll_brings(order, hops):
    ring, networks = Ring(order), len(order)
    rolled = ring.teachers(jnp.arange(networks), hops).tolist()
    assert rolled == [ring.teacher_of(k, hops) for k in range(networks)]


@pytest.mark.parametrize('order', [(0, 1, 2), (1, 0, 2)])
def test_no_gradient_reaches_a_teacher(order):
    own = jnp.arange(6.0).reshape(3, 2)
    gradient = jax.grad(lambda x: (Ring(order).teachers(x) ** 2).sum())(own)
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))
