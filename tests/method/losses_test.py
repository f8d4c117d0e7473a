"""The losses: laws, and NumPy float64 re-derivations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import softmax, take_devices

from afkd_jax.devices.mesh import BATCH_SHARDED
from afkd_jax.method import losses
from afkd_jax.method.ring import Ring


@pytest.fixture
def logits():
    return np.random.default_rng(1).standard_normal((3, 5, 7)) * 3


def test_cross_entropy_equals_numpy(logits, x64):
    labels = np.random.default_rng(2).integers(0, 7, 5)
    expected = [[-np.log(softmax(z)[y]) for z, y in zip(zs, labels, strict=True)] for zs in logits]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-12)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_mimicry_kl_equals_numpy(logits, temperature, x64):
    teacher = np.random.default_rng(3).standard_normal(logits.shape) * 3
    q, p = softmax(teacher / temperature), softmax(logits / temperature)
    expected = temperature**2 * (q * (np.log(q) - np.log(p))).sum(-1)
    actual = losses.mimicry_kl(logits, teacher, temperature)
    np.testing.assert_allclose(actual, expected, rtol=1e-11)


def test_mimicry_kl_of_equals_is_zero_and_else_positive(logits):
    assert np.abs(losses.mimicry_kl(logits, logits, 3.0)).max() == 0
    assert losses.mimicry_kl(logits, logits[::-1], 3.0)[0].min() > 0
    # The KL compares distributions: a constant added to all logits changes nothing.
    assert np.abs(losses.mimicry_kl(logits, logits + 5.0, 3.0)).max() < 1e-5


def test_mimicry_kl_is_the_forward_kl_of_the_teacher():
    # KL(q || p) is large where the teacher is sure of what the student rules out.
    sure, spread = jnp.array([[20.0, 0.0]]), jnp.array([[0.0, 0.0]])
    np.testing.assert_allclose(losses.mimicry_kl(spread, sure, 1.0), [np.log(2)], rtol=1e-5)
    assert losses.mimicry_kl(sure, spread, 1.0)[0] > 5


def test_temperature_squared_keeps_the_scale_of_the_gradient(x64):
    # For large T the gradient tends to (z - mean z) - (z_t - mean z_t), over C: free of T.
    rng = np.random.default_rng(4)
    own, teacher = rng.standard_normal((2, 7))

    def gradient(t):
        return jax.grad(lambda z: losses.mimicry_kl(z, teacher, t))(own)

    limit = ((own - own.mean()) - (teacher - teacher.mean())) / 7
    for temperature in (100.0, 1000.0):
        np.testing.assert_allclose(
            gradient(temperature), limit, atol=2 * np.abs(limit).max() / temperature
        )
    ratio = np.linalg.norm(gradient(6.0)) / np.linalg.norm(gradient(3.0))
    assert 0.7 < ratio < 1.4  # without the factor it would be near 1/4


def test_least_squares_terms_equal_numpy():
    own, teacher = np.random.default_rng(5).uniform(size=(2, 9))
    np.testing.assert_allclose(losses.generator_loss(own), (1 - own) ** 2, rtol=1e-6)
    np.testing.assert_allclose(
        losses.discriminator_loss(own, teacher), (1 - teacher) ** 2 + own**2, rtol=1e-6
    )
    assert losses.generator_loss(1.0) == 0
    assert losses.discriminator_loss(0.0, 1.0) == 0
    assert losses.discriminator_loss(1.0, 0.0) == 2


@pytest.mark.parametrize('student', [0, 1, 2])
def test_a_students_loss_gives_its_teacher_a_gradient_of_exactly_zero(student, logits):
    def students_kl(z):
        return losses.mimicry_kl(z, Ring((0, 1, 2)).teachers(z), 3.0)[student].mean()

    gradient = np.asarray(jax.grad(students_kl)(jnp.asarray(logits)))
    moved = [bool(np.abs(part).max() > 0) for part in gradient]
    assert moved == [k == student for k in range(3)]


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.9])
def test_smoothed_cross_entropy_is_that_of_the_smoothed_labels(logits, smoothing, x64):
    labels = np.random.default_rng(2).integers(0, 7, 5)
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(target * np.log(softmax(logits))).sum(-1)
    actual = losses.cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_ramp_rises_to_1_and_stays():
    values = [float(losses.ramp_up(step, 10)) for step in (0, 5, 9, 10, 1000)]
    np.testing.assert_allclose(values, np.exp([-5, -1.25, -0.05, 0, 0]), rtol=1e-6)


def test_l1_equals_numpy(x64):
    own, teacher = np.random.default_rng(3).standard_normal((2, 3, 5, 4, 4, 6))
    actual = losses.l1(own, teacher)
    np.testing.assert_allclose(actual, np.abs(own - teacher).mean((2, 3, 4)), rtol=1e-12)
    assert np.abs(losses.l1(own, own)).max() == 0


@pytest.mark.parametrize('count', [1, 4])
def test_moments_and_their_gradient_equal_numpy(count, x64):
    # L = mean over b of mean_c (m - m')^2 + (v - v')^2 of b's class, and, by hand, with n elements
    # of a class and N images: dL/dx = sum_b (2 (m - m') + 4 (v - v') (x - m)) / (n C N).
    maps, teachers = np.random.default_rng(6).standard_normal((2, 8, 3, 3, 5))
    labels = np.array([0, 1, 1, 0, 1, 2, 1, 1])
    loss, gradient = np.zeros(8), np.zeros_like(maps)
    for label in range(3):
        members = labels == label
        own, theirs = (x[members].reshape(-1, 5) for x in (maps, teachers))
        m = own.mean(0) - theirs.mean(0)
        v = own.var(0) - theirs.var(0)
        loss[members] = (m**2 + v**2).mean()
        slope = 2 * m + 4 * v * (maps[members] - own.mean(0))
        gradient[members] = members.sum() * slope / (len(own) * 5 * 8)

    def per_device(maps, teachers, labels):
        def mean(maps):
            values = losses.moments(maps, teachers, labels)
            return values.mean(), values

        # The step averages gradients over the devices.
        slope, values = jax.grad(mean, has_aux=True)(maps)
        return values, slope / count

    devices = take_devices(count)
    mapped = devices.map(per_device, (BATCH_SHARDED,) * 3, (BATCH_SHARDED,) * 2)
    values, slope = mapped(maps, teachers, labels)
    np.testing.assert_allclose(values, loss, rtol=1e-10)
    np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-14)
