"""Logit teachers against NumPy and SciPy, and their laws."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import relative_difference, softmax, take_devices

from afkd_jax.config import Loss
from afkd_jax.devices.mesh import BATCH_SHARDED
from afkd_jax.method import presets, teachers
from afkd_jax.method.objective import Objective
from afkd_jax.method.ring import Ring
from afkd_jax.registry import LOGIT_TEACHERS

NETWORKS, BATCH, CLASSES = 3, 8, 5
LABELS = np.array([0, 3, 1, 1, 2, 3, 1, 4])  # 0, 2 and 4 are alone in their class


@pytest.fixture
def logits():
    return np.random.default_rng(0).standard_normal((NETWORKS, BATCH, CLASSES)) * 2


def taught(name, logits, devices=2):
    """Returns what the teacher returns, mapped over devices: [K, B, C]."""
    ring, mesh = Ring(tuple(range(len(logits)))), take_devices(devices)

    def per_device(logits_BxKxC, labels_B):
        (taught,) = LOGIT_TEACHERS.get(name)(ring, jnp.swapaxes(logits_BxKxC, 0, 1), labels_B)
        return jnp.swapaxes(taught, 0, 1)

    mapped = mesh.map(per_device, (BATCH_SHARDED, BATCH_SHARDED), BATCH_SHARDED)
    return np.swapaxes(mapped(np.swapaxes(logits, 0, 1), LABELS), 0, 1)


def entropies(logits):
    """Returns the cross-entropies [..., B]."""
    return -np.log(softmax(logits)[..., np.arange(BATCH), LABELS])


def test_loo_mean_is_the_mean_of_the_others(logits, x64):
    expected = [(logits.sum(0) - logits[k]) / 2 for k in range(3)]
    np.testing.assert_allclose(taught('loo_mean', logits), expected, rtol=1e-12)


def test_for_two_networks_loo_mean_is_dml_to_the_bit(logits):
    logits = jnp.asarray(logits[:2], jnp.float32)
    one, other = (
        Objective(presets.named(name), Ring((0, 1)), Loss(), 0).of_logits(logits, LABELS, 0)
        for name in ('loo_mean', 'dml')
    )
    assert relative_difference(one, other)[0] == 0


@pytest.mark.parametrize('devices', [1, 4])
def test_shuffled_is_the_teacher_of_the_next_image_of_the_class(devices, logits):
    # By hand: images 2, 3 and 6 are of class 1, images 1 and 5 of class 3; the others are alone.
    partners = [0, 5, 3, 6, 4, 1, 2, 7]
    assert teachers.next_of_class(LABELS).tolist() == partners
    expected = logits[[2, 0, 1]][:, partners]
    for alone in (0, 4, 7):
        expected[:, alone] = logits[:, alone]
    np.testing.assert_allclose(taught('shuffled', logits, devices), expected, rtol=1e-6)


def test_kdcl_naive_takes_the_best_network_of_each_image(logits, x64):
    expected = np.stack([logits[entropies(logits)[:, b].argmin(), b] for b in range(BATCH)])
    assert {entropies(logits)[:, b].argmin() for b in range(BATCH)} == {0, 1, 2}
    np.testing.assert_allclose(taught('kdcl_naive', logits), [expected] * 3, rtol=1e-12)


def test_kdcl_minlogit_equals_its_formula(logits, x64):
    expected = np.empty((BATCH, CLASSES))
    for b, j in np.ndindex(expected.shape):
        expected[b, j] = min(logits[k, b, j] - logits[k, b, LABELS[b]] for k in range(3))
    np.testing.assert_allclose(taught('kdcl_minlogit', logits), [expected] * 3, rtol=1e-12)
    # Its cross-entropy is at most that of any network.
    assert (entropies(expected) <= entropies(logits).min(0) + 1e-12).all()


def test_kdcl_mean_is_the_mean_of_the_logits(logits, x64):
    expected = (logits[0] + logits[1] + logits[2]) / 3
    np.testing.assert_allclose(taught('kdcl_mean', logits), [expected] * 3, rtol=1e-12)


def best_weights(logits):
    """Returns the simplex weights by SciPy."""

    def entropy(w):
        return entropies(np.tensordot(w, logits, 1)).mean()

    count = len(logits)
    found = scipy.optimize.minimize(
        entropy,
        np.full(count, 1 / count),
        bounds=[(0, 1)] * count,
        constraints={'type': 'eq', 'fun': lambda w: w.sum() - 1},
        method='SLSQP',
        options={'ftol': 1e-14, 'maxiter': 500},
    )
    return found.x, found.fun


@pytest.mark.parametrize('devices', [1, 2])
def test_kdcl_linear_is_the_best_mixture_over_the_global_batch(devices, logits, x64):
    # Logits that are right in part, so that the best weights are inside the simplex.
    logits = logits + 1.5 * np.eye(CLASSES)[LABELS] * np.array([1.0, 0.8, 0.9])[:, None, None]
    weights, _ = best_weights(logits)
    assert weights.min() > 0.05
    expected = np.tensordot(weights, logits, 1)
    got = taught('kdcl_linear', logits, devices)
    np.testing.assert_allclose(got, [expected] * 3, atol=2e-5)


@pytest.mark.parametrize(('seed', 'scale'), [(0, 0.1), (1, 3.0), (2, 30.0), (3, 3.0)])
def test_simplex_weights_are_optimal_in_single_precision(seed, scale):
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((2 + seed % 3, BATCH, CLASSES))
    logits += scale * rng.uniform(0, 1) * np.eye(CLASSES)[LABELS]
    weights = np.asarray(teachers.simplex_weights(jnp.float32(logits), LABELS), np.float64)
    assert weights.min() >= 0
    assert abs(weights.sum() - 1) < 1e-6
    _, least = best_weights(logits)
    assert entropies(np.tensordot(weights, logits, 1)).mean() - least < 1e-5 * max(1, scale)


def test_of_equal_networks_all_simplex_weights_are_equal(logits):
    logits = jnp.float32(np.stack([logits[0]] * 4))
    np.testing.assert_allclose(teachers.simplex_weights(logits, LABELS), [0.25] * 4, rtol=1e-4)
