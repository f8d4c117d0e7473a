"""The losses: pure functions with one value per example; objective.py takes the one mean."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from afkd_jax.devices.spmd import whole_batch
from afkd_jax.registry import register_map_loss


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Returns -sum_c q_c log softmax(logits)_c, q = (1 - smoothing) one-hot(label) + smoothing / C.

    Logits [..., B, C], labels [B] in 0 .. C - 1 and smoothing in [0, 1): [..., B] >= 0, in nats.
    Source: paper, logit loss, first term; label smoothing (not the paper's): Szegedy et al. 2016.
    """
    log_p = jax.nn.log_softmax(logits)
    index = jnp.broadcast_to(labels, logits.shape[:-1])[..., None]
    entropy = -jnp.take_along_axis(log_p, index, axis=-1)[..., 0]
    if smoothing:
        entropy = (1 - smoothing) * entropy - smoothing * log_p.mean(-1)
    return entropy


def mimicry_kl(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Logits [..., B, C]: [..., B] >= 0, in nats times T^2. The factor T^2 keeps the scale of the
    gradient as T > 0 grows (Hinton et al. 2015). The caller stops the teacher's gradient (ring.py).
    Source: paper, logit loss, second term; T = 3 is remembered, not verified.
    """
    log_q = jax.nn.log_softmax(teacher_logits / temperature)
    log_p = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def ramp_up(step: jax.Array, steps: int) -> jax.Array:
    """Returns exp(-5 (1 - min(step / steps, 1))^2): a weight that rises from 0.007 to 1.

    Steps are counted from 0; `steps` is above 0.
    Source: Laine and Aila 2017, as in related online distillation; unknown for AFD.
    """
    return jnp.exp(-5.0 * jnp.square(1.0 - jnp.minimum(step / steps, 1.0)))


@register_map_loss('l1')
def l1(maps: jax.Array, teacher_maps: jax.Array) -> jax.Array:
    """Returns the mean of |student - teacher| over a map's elements.

    Maps [..., B, H, W, C]: [..., B] >= 0. The caller stops the teacher's gradient (ring.py).
    Source: the paper's L1 baseline, by a third party's report; the mean is our choice.
    """
    return jnp.abs(maps - teacher_maps).mean((-3, -2, -1))


def l1_to_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns |softmax(logits) - one-hot(label)|_1, in 0 .. 2. [..., B, C], [B] -> [..., B]."""
    index = jnp.broadcast_to(labels, logits.shape[:-1])[..., None]
    return 2 * (1 - jnp.take_along_axis(jax.nn.softmax(logits), index, axis=-1)[..., 0])


def l1_to_teacher(logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Returns |softmax(logits) - softmax(teacher)|_1, in 0 .. 2. [..., B, C] -> [..., B]."""
    return jnp.abs(jax.nn.softmax(logits) - jax.nn.softmax(teacher_logits)).sum(-1)


def switches(gap: jax.Array, teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Returns whether the teacher of a pair skips its update: gap > s - exp(-t / (s + t)) t, t < s.

    gap: the mean of l1_to_teacher over the batch; t = teacher and s = student: of l1_to_labels.
    Source: SwitOKD, Qian et al. 2022, and the authors' code.
    """
    ratio = teacher / jnp.maximum(student + teacher, 1e-12)
    return (gap > student - jnp.exp(-ratio) * teacher) & (teacher < student)


@register_map_loss('moments')
def moments(maps: jax.Array, teacher_maps: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over channels of (m - m')^2 + (v - v')^2, of each image's class.

    m and v are mean and variance of a channel over height, width and the images of the class in the
    global batch, m' and v' the teacher's. Maps [..., B, H, W, C], labels [B]: [..., B] >= 0. The
    mean over the batch weights classes by their images. The caller stops the teacher's gradient.
    Source: none; our control for the adversarial loss, which may match such moments.
    """
    same_BxA = (labels[:, None] == whole_batch(labels)[None]).astype(maps.dtype)
    weights_BxA = same_BxA / same_BxA.sum(1, keepdims=True)

    def of_class(x: jax.Array) -> jax.Array:
        return jnp.einsum('ba,...ac->...bc', weights_BxA, whole_batch(x.mean((-3, -2)), axis=-2))

    mean, teacher_mean = of_class(maps), of_class(teacher_maps)
    variance = of_class(jnp.square(maps)) - jnp.square(mean)
    teacher_variance = of_class(jnp.square(teacher_maps)) - jnp.square(teacher_mean)
    return (jnp.square(mean - teacher_mean) + jnp.square(variance - teacher_variance)).mean(-1)


def generator_loss(d_own: jax.Array) -> jax.Array:
    """Returns (1 - D(student's map))^2: the student's map shall be taken for the teacher's.

    d_own: D(student's map), in (0, 1), any shape. Source: paper, L_G, least-squares form.
    """
    return jnp.square(1.0 - d_own)


def discriminator_loss(d_own: jax.Array, d_teacher: jax.Array) -> jax.Array:
    """Returns (1 - D(teacher's map))^2 + D(student's map)^2: teacher is real (1), student fake (0).

    d_own and d_teacher: D(map), in (0, 1), any one shape. Source: paper, L_D, least-squares form.
    """
    return jnp.square(1.0 - d_teacher) + jnp.square(d_own)


def hinge_generator_loss(d_own: jax.Array) -> jax.Array:
    """Returns -D(student's map), any shape. Source: Lim and Ye 2017; Miyato et al. 2018."""
    return -d_own


def hinge_discriminator_loss(d_own: jax.Array, d_teacher: jax.Array) -> jax.Array:
    """Returns max(0, 1 - D(teacher's map)) + max(0, 1 + D(student's map)).

    d_own and d_teacher: D(map), of any size, any one shape. Source: Lim and Ye 2017.
    """
    return jax.nn.relu(1.0 - d_teacher) + jax.nn.relu(1.0 + d_own)


@dataclasses.dataclass(frozen=True)
class AdversarialLoss:
    """L_G, L_D, and the outputs of D at which L_D wants the student's ("fake") maps.

    At 1 it wants the teacher's ("real").
    """

    generator: Callable[[jax.Array], jax.Array]
    discriminator: Callable[[jax.Array, jax.Array], jax.Array]
    fake: float

    def between(self, d: jax.Array) -> jax.Array:
        """Returns where D's output lies from 0, the goal for fake, to 1, for real; not beyond."""
        return jnp.clip((d - self.fake) / (1.0 - self.fake), 0.0, 1.0)


# config.discriminator.loss -> losses; 'lsgan' is of a sigmoid's output.
ADVERSARIAL = {
    'lsgan': AdversarialLoss(generator_loss, discriminator_loss, 0.0),
    'lsgan_linear': AdversarialLoss(generator_loss, discriminator_loss, 0.0),
    'hinge': AdversarialLoss(hinge_generator_loss, hinge_discriminator_loss, -1.0),
}
