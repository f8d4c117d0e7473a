"""Logit teachers: what the logits learn from. Pure functions of the networks' logits.

Registered ones take (ring, logits [K, B, C], labels [B]) and return a list of teachers' logits,
each [K, B, C]; the objective stops their gradient. See registry.LOGIT_TEACHERS.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from afkd_jax.devices.spmd import batch_index, whole_batch
from afkd_jax.method import losses
from afkd_jax.registry import register_logit_teacher

# Number of networks -> how many hops along the ring each teacher of a network's logits is away. A
# teacher that is not here needs the logits of all networks on every device.
HOPS: dict[str, Callable[[int], range]] = {
    'nobody': lambda networks: range(0),
    'ring': lambda networks: range(1, 2),
    'all': lambda networks: range(1, networks),
    'loo_mean': lambda networks: range(1, networks),
    'shuffled': lambda networks: range(1, 2),
    'switokd': lambda networks: range(1, 2),
}
# Teachers that depend on the student's own logits, or on the networks as they are.
LIVE_ONLY = ('shuffled', 'switokd')


def _along_the_ring(hops: Callable[[int], range]) -> Callable[..., list[jax.Array]]:
    def teachers(ring: Any, logits_KxBxC: jax.Array, labels_B: jax.Array) -> list[jax.Array]:
        return [ring.teachers(logits_KxBxC, hop) for hop in hops(len(ring.order))]

    return teachers


for _name in ('nobody', 'ring', 'all', 'switokd'):
    register_logit_teacher(_name)(_along_the_ring(HOPS[_name]))


@register_logit_teacher('loo_mean')
def loo_mean(ring: Any, logits_KxBxC: jax.Array, labels_B: jax.Array) -> list[jax.Array]:
    """Returns the mean of the logits of all other networks. Equals 'all' for two networks.

    Source: Song and Chai 2018 (collaborative learning, CL-ILR), without the shared stem, and with
    CE and KL not halved.
    """
    others = _along_the_ring(HOPS['loo_mean'])(ring, logits_KxBxC, labels_B)
    return [sum(others[1:], others[0]) / len(others)]


@register_logit_teacher('shuffled')
def shuffled(ring: Any, logits_KxBxC: jax.Array, labels_B: jax.Array) -> list[jax.Array]:
    """Returns the predecessor's logits of another image of the same class: a control.

    Of the next image of the class in the global batch. Where there is no other, the teacher is the
    student itself, so that the KL and its gradient are 0. Source: none, our control.
    """
    index_B = batch_index(len(labels_B))
    partners_B = next_of_class(whole_batch(labels_B))[index_B]
    taught_KxBxC = whole_batch(ring.teachers(logits_KxBxC), axis=1)[:, partners_B]
    alone_B = partners_B == index_B
    return [jnp.where(alone_B[None, :, None], logits_KxBxC, taught_KxBxC)]


def next_of_class(labels_B: jax.Array) -> jax.Array:
    """Returns the place of the next image of the same class, cyclically; its own if none: [B]."""
    place_B = jnp.arange(len(labels_B))
    ahead_BxB = (place_B[None] - place_B[:, None] - 1) % len(labels_B)  # its own: the largest
    return jnp.where(labels_B[:, None] == labels_B[None], ahead_BxB, len(labels_B)).argmin(1)


def _for_all(target: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., list[jax.Array]]:
    """Returns the logit teacher with one target [B, C] for all networks."""

    def teachers(ring: Any, logits_KxBxC: jax.Array, labels_B: jax.Array) -> list[jax.Array]:
        target_BxC = target(jax.lax.stop_gradient(logits_KxBxC), labels_B)
        return [jnp.broadcast_to(target_BxC[None], logits_KxBxC.shape)]

    return teachers


def _logit_of(logits_KxBxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_KxBxC, labels_B[None, :, None], axis=-1)


def naive(logits_KxBxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Returns per image the logits of the network with the least cross-entropy: [B, C].

    Source: KDCL-Naive, Guo et al. 2020. Of equal networks the first.
    """
    best_B = losses.cross_entropy(logits_KxBxC, labels_B).argmin(0)
    return jnp.take_along_axis(logits_KxBxC, best_B[None, :, None], axis=0)[0]


def minlogit(logits_KxBxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Returns z[j] = min_k (z_k[j] - z_k[y]): [B, C]. Source: KDCL-MinLogit, Guo et al. 2020."""
    return (logits_KxBxC - _logit_of(logits_KxBxC, labels_B)).min(0)


def mean(logits_KxBxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Returns the mean of the logits: [B, C].

    Source: the best-known re-implementation of KDCL, whatever the paper's variant is called.
    """
    return logits_KxBxC.mean(0)


def linear(logits_KxBxC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Returns sum_k w_k z_k with the simplex_weights of the global batch: [B, C].

    Source: KDCL-Linear, Guo et al. 2020.
    """
    weights_K = simplex_weights(whole_batch(logits_KxBxC, axis=1), whole_batch(labels_B))
    return (weights_K[:, None, None] * logits_KxBxC).sum(0)


def simplex_weights(
    logits_KxBxC: jax.Array, labels_B: jax.Array, iterations: int = 32
) -> jax.Array:
    """Returns the w [K] >= 0 of sum 1 with the least mean CE(y, sum_k w_k z_k), which is convex.

    Newton's method on CE - m sum_k log w_k, where m falls by 0.6 in each of the iterations and the
    sum stays 1: the result is within K m of the least CE, m = 0.6^32 = 8e-8. Of equal networks all
    weights are equal.
    """
    networks = len(logits_KxBxC)
    # Relative to the label's, so that CE is the logsumexp; a linear function of w.
    relative_KxBxC = logits_KxBxC - _logit_of(logits_KxBxC, labels_B)

    def newton(i: jax.Array, weights_K: jax.Array) -> jax.Array:
        p_BxC = jax.nn.softmax((weights_K[:, None, None] * relative_KxBxC).sum(0))
        mean_KxB = (p_BxC[None] * relative_KxBxC).sum(-1)
        centred_KxBxC = relative_KxBxC - mean_KxB[..., None]
        hessian_KxK = jnp.einsum('bc,kbc,jbc->kj', p_BxC, centred_KxBxC, centred_KxBxC)
        hessian_KxK /= len(labels_B)
        barrier = 0.6**i
        gradient_K = mean_KxB.mean(1) - barrier / weights_K
        hessian_KxK += jnp.diag(barrier / weights_K**2)
        solved = jnp.linalg.solve(hessian_KxK, jnp.stack([gradient_K, jnp.ones_like(weights_K)], 1))
        step_K = solved[:, 1] * (solved[:, 0].sum() / solved[:, 1].sum()) - solved[:, 0]
        longest = jnp.where(step_K < 0, -weights_K / jnp.minimum(step_K, -1e-30), 1e30).min()
        moved_K = weights_K + jnp.minimum(1.0, 0.9 * longest) * step_K
        return moved_K / moved_K.sum()

    start_K = jnp.full_like(logits_KxBxC[:, 0, 0], 1 / networks)
    return jax.lax.fori_loop(0, iterations, newton, start_K)


for _name, _target in {
    'kdcl_naive': naive,
    'kdcl_minlogit': minlogit,
    'kdcl_mean': mean,
    'kdcl_linear': linear,
}.items():
    register_logit_teacher(_name)(_for_all(_target))
