"""A method's losses: learning from all of three networks against NumPy; what weights scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import softmax

from afkd_jax.config import Loss
from afkd_jax.data.augment import Mixed
from afkd_jax.errors import UserError
from afkd_jax.method.objective import Objective
from afkd_jax.method.presets import Method
from afkd_jax.method.ring import Ring
from afkd_jax.registry import LOGIT_TEACHERS


def objective(logits='nobody', maps='nothing', order=(0, 1, 2), kl_ramp_steps=0, **fields):
    loss = Loss(temperature=2.0, **fields)
    return Objective(Method(logits, maps), Ring(order), loss, kl_ramp_steps)


@pytest.fixture
def logits():
    return np.random.default_rng(0).standard_normal((3, 5, 4)) * 2


LABELS = np.array([0, 3, 1, 1, 2])


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_learning_from_all_of_three_equals_numpy(order, logits, x64):
    # The gradient to z_k of CE + mean over the two others of T^2 KL(q || p) is, per image of B,
    # (p(1) - onehot + T mean (p(T) - q(T))) / B; whatever the order of the ring.
    to_logits, values = objective('all', order=order).of_logits(jnp.array(logits), LABELS, 0)
    for k in range(3):
        others = [j for j in range(3) if j != k]
        p, p_T = softmax(logits[k]), softmax(logits[k] / 2.0)
        q_T = [softmax(logits[j] / 2.0) for j in others]
        entropy = -np.log(p[np.arange(5), LABELS]).mean()
        kl = np.mean([4 * (q * (np.log(q) - np.log(p_T))).sum(1).mean() for q in q_T])
        np.testing.assert_allclose(values['cross_entropy'][k], entropy, rtol=1e-10)
        np.testing.assert_allclose(values['mimicry_kl'][k], kl, rtol=1e-10)
        gradient = (p - np.eye(4)[LABELS] + 2.0 * np.mean([p_T - q for q in q_T], axis=0)) / 5
        np.testing.assert_allclose(to_logits[k], gradient, rtol=1e-9, atol=1e-12)


def test_of_mixed_images_both_labels_count_by_their_weights(logits, x64):
    weight, other = np.array([0.2, 1.0, 0.0, 0.7, 0.5]), LABELS[::-1].copy()
    mixed = Mixed(other, weight)
    to_logits, values = objective().of_logits(jnp.array(logits), LABELS, 0, mixed)
    labels = weight[:, None] * np.eye(4)[LABELS] + (1 - weight)[:, None] * np.eye(4)[other]
    for k in range(3):
        p = softmax(logits[k])
        entropy = -(labels * np.log(p)).sum(1).mean()
        np.testing.assert_allclose(values['cross_entropy'][k], entropy, rtol=1e-10)
        np.testing.assert_allclose(to_logits[k], (p - labels) / 5, rtol=1e-9, atol=1e-12)


@pytest.fixture
def register(monkeypatch):
    """Registers a logit teacher 'own' until the end of the test."""
    LOGIT_TEACHERS.names()
    monkeypatch.setattr(LOGIT_TEACHERS, '_parts', dict(LOGIT_TEACHERS._parts))
    return LOGIT_TEACHERS.register('own')


def test_a_logit_teacher_that_returns_the_rings_logits_is_the_ring(logits, register):
    order, predecessors = (1, 0, 2), np.array([1, 2, 0])
    register(lambda ring, logits, labels: [logits[predecessors]])
    logits = jnp.array(logits, jnp.float32)
    for own, built_in in zip(
        jax.tree.leaves(objective('own', order=order).of_logits(logits, LABELS, 0)),
        jax.tree.leaves(objective('ring', order=order).of_logits(logits, LABELS, 0)),
        strict=True,
    ):
        np.testing.assert_array_equal(own, built_in)


def test_the_gradient_into_a_logit_teacher_is_stopped(logits, register, x64):
    # It depends on the student's own logits and on the labels; the KL is the mean over the list.
    def own(ring, logits, labels):
        return [2 * logits, logits + 3 * jax.nn.one_hot(labels, 4)[None]]

    register(own)
    to_logits, values = objective('own').of_logits(jnp.array(logits), LABELS, 0)
    p, p_T = softmax(logits), softmax(logits / 2.0)
    q_T = [softmax(logits), softmax((logits + 3 * np.eye(4)[LABELS]) / 2.0)]
    gradient = (p - np.eye(4)[LABELS] + 2.0 * np.mean([p_T - q for q in q_T], axis=0)) / 5
    np.testing.assert_allclose(to_logits, gradient, rtol=1e-9, atol=1e-12)
    kl = np.mean([4 * (q * np.log(q / p_T)).sum(-1).mean(-1) for q in q_T], axis=0)
    np.testing.assert_allclose(values['mimicry_kl'], kl, rtol=1e-10)


@pytest.mark.parametrize(
    ('teachers', 'shapes'), [([], r'\[\]'), (np.zeros((3, 5, 4)), r'\[\(5, 4\), .*')]
)
def test_what_a_logit_teacher_returns_is_checked(teachers, shapes, logits, register):
    register(lambda *_: teachers)
    with pytest.raises(UserError, match=rf'"own" must return .* \(3, 5, 4\), .*returns {shapes}'):
        objective('own').of_logits(jnp.array(logits), LABELS, 0)


def test_the_ramp_weights_the_kl_only(logits, x64):
    alone, _ = objective().of_logits(jnp.array(logits), LABELS, 0)
    full, values = objective('ring', kl_weight=0.5).of_logits(jnp.array(logits), LABELS, 0)
    for step, weight in ((0, np.exp(-5)), (5, np.exp(-1.25)), (10, 1.0), (99, 1.0)):
        ramped = objective('ring', kl_weight=0.5, kl_ramp_steps=10)
        gradient, reported = ramped.of_logits(jnp.array(logits), LABELS, step)
        np.testing.assert_allclose(gradient - alone, weight * (full - alone), atol=1e-12)
        # What is reported is the KL itself.
        np.testing.assert_allclose(reported['mimicry_kl'], values['mimicry_kl'])


def test_the_gradient_of_l1_is_the_sign_over_the_number_of_elements(x64):
    maps = np.random.default_rng(1).standard_normal((3, 2, 4, 4, 5))
    gradient, values = objective(maps='l1', map_weight=0.5).of_maps(jnp.array(maps), LABELS)
    teachers = maps[[2, 0, 1]]
    np.testing.assert_allclose(gradient, 0.5 * np.sign(maps - teachers) / maps[0].size, rtol=1e-12)
    np.testing.assert_allclose(values['l1'], np.abs(maps - teachers).mean((1, 2, 3, 4)))


def test_adversarial_gradients_equal_the_formulas(x64):
    # D(map) = sigmoid(w . map): L_G's gradient is -2 (1 - d) d (1 - d) w / B, and L_D's
    # -2 (1 - d_p) d_p (1 - d_p) m_p + 2 d d (1 - d) m, averaged.
    rng = np.random.default_rng(2)
    maps, weights = rng.standard_normal((3, 4, 2, 2, 3)), rng.standard_normal((3, 2, 2, 3))

    def discriminator(w, m, condition):
        return jax.nn.sigmoid((w[None] * m).sum((1, 2, 3))), {}

    adversarial = objective(maps='adversarial', adversarial_weight=3.0)
    to_maps, to_discriminators, _, values = adversarial.of_adversaries(
        [discriminator] * 3, list(jnp.array(weights)), jnp.array(maps)
    )
    for k in range(3):
        own, teacher, w = maps[k], maps[k - 1], weights[k]
        d, d_p = (1 / (1 + np.exp(-(m * w).sum((1, 2, 3)))) for m in (own, teacher))
        to_map = -2 * (1 - d) ** 2 * d
        expected = 3.0 * to_map[:, None, None, None] * w / 4
        np.testing.assert_allclose(to_maps[k], expected, rtol=1e-9)
        real, fake = -2 * (1 - d_p) ** 2 * d_p, 2 * d**2 * (1 - d)
        expected = (
            np.einsum('b,bhwc->hwc', real, teacher) + np.einsum('b,bhwc->hwc', fake, own)
        ) / 4
        np.testing.assert_allclose(to_discriminators[k], expected, rtol=1e-9)
        np.testing.assert_allclose(values['adversarial'][k], ((1 - d) ** 2).mean())
        np.testing.assert_allclose(values['discriminator'][k], ((1 - d_p) ** 2 + d**2).mean())
