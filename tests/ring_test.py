"""The ring: who teaches whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from afkd_jax import ring


@pytest.mark.parametrize('networks', [2, 3, 5, 8])
def test_k_hops_round_the_ring_are_the_identity(networks):
    own = np.random.default_rng(0).standard_normal((networks, 4, 3))
    moved = own
    for hop in range(networks):
        assert hop == 0 or not np.array_equal(moved, own)
        moved = np.asarray(ring.teachers(moved))
    np.testing.assert_array_equal(moved, own.astype(moved.dtype))


def test_three_networks_are_the_drawing():
    # teacher 1 -> pupil 2, 2 -> 3, 3 -> 1
    assert ring.teachers(jnp.array([1, 2, 3])).tolist() == [3, 1, 2]
    assert [ring.teacher_of(k, 3) + 1 for k in range(3)] == [3, 1, 2]


def test_two_networks_teach_each_other():
    assert ring.teachers(jnp.array([10, 20])).tolist() == [20, 10]


@pytest.mark.parametrize('networks', [2, 3, 7])
def test_teacher_of_names_whom_the_roll_brings(networks):
    rolled = ring.teachers(jnp.arange(networks)).tolist()
    assert rolled == [ring.teacher_of(k, networks) for k in range(networks)]


def test_no_gradient_reaches_a_teacher():
    own = jnp.arange(6.0).reshape(3, 2)
    gradient = jax.grad(lambda x: (ring.teachers(x) ** 2).sum())(own)
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))
