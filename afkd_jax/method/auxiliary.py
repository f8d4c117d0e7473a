"""Auxiliary modules: methods with parameters besides those of the networks.

A module sees the logits and maps of all networks; its loss replaces the KL to the teachers. Both
are part of the logit loss, and the module is updated by a logit optimizer of its own. It is only
used in training, and not exported.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.devices.spmd import batch_index, whole_batch
from afkd_jax.method.adversary import average_pool
from afkd_jax.models.layers import Layers

Values = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of the logit loss, as config.loss sets them; each is a mean over the batch.

    Attributes:
      cross_entropy: of logits [..., B, C], with label smoothing and mixed labels: [...].
      kl: of logits and teacher's logits [..., B, C], mimicry_kl: [...].
      temperature: of the KL.
      weight: of the KL, a scalar.
    """

    cross_entropy: Callable[[jax.Array], jax.Array]
    kl: Callable[[jax.Array, jax.Array], jax.Array]
    temperature: float
    weight: Any


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """A method with an auxiliary module.

    Attributes:
      module: (layers, number of networks, number of classes) -> the module, which maps
        (logits [K, B, C], maps, K of [B, h, w, c], train) to its outputs.
      loss: (outputs, logits [K, B, C], labels [B], Terms) -> what is added to the cross-entropies
        of the networks, and the values that are reported.
      names: of the values [K].
      step_names: of the values that are scalars.
      least: number of networks.
      held_out: (error products [K, K] of the validation images (error_products), their number) ->
        what takes the place of the module's batch statistics after each evaluation; None: nothing.
    """

    module: Callable[[Layers, int, int], nn.Module]
    loss: Callable[[Any, jax.Array, jax.Array, Terms], tuple[jax.Array, Values]]
    names: tuple[str, ...] = ('mimicry_kl',)
    step_names: tuple[str, ...] = ()
    least: int = 2
    held_out: Callable[[np.ndarray, int], dict[str, np.ndarray]] | None = None


def _pooled(maps: jax.Array) -> jax.Array:
    """Returns the mean over height and width, [B, C]."""
    return at_least_float32(maps).mean((1, 2))


class Gate(nn.Module):
    """The gate of ONE: softmax(ReLU(BatchNorm(Dense(concatenated pooled maps)))).

    Without a bias before the norm, which would cancel.
    """

    layers: Layers
    networks: int

    @nn.compact
    def __call__(
        self, logits_KxBxC: jax.Array, maps: Sequence[jax.Array], train: bool
    ) -> jax.Array:
        """Returns the networks' weights, of sum 1: [B, K]."""
        pooled = jnp.concatenate([_pooled(own) for own in maps], axis=-1)
        x = nn.Dense(self.networks, use_bias=False, dtype=self.layers.dtype)(pooled)
        x = self.layers.norm(use_running_average=not train)(x)
        return nn.softmax(at_least_float32(nn.relu(x)))


def one_loss(
    gate_BxK: jax.Array, logits_KxBxC: jax.Array, labels_B: jax.Array, terms: Terms
) -> tuple[jax.Array, Values]:
    """Returns CE(z_e) + w sum_k KL_T(sg z_e -> z_k), z_e = sum_k g_k z_k, and values.

    Source: ONE, Lan et al. 2018; there, branches of one network. OKDDip's copy does not stop the
    gradient into z_e and adds 1e-7.
    """
    ensemble_BxC = jnp.einsum('bk,kbc->bc', gate_BxK, logits_KxBxC)
    entropy = terms.cross_entropy(ensemble_BxC)
    kl_K = terms.kl(logits_KxBxC, jax.lax.stop_gradient(ensemble_BxC)[None])
    return entropy + terms.weight * kl_K.sum(), {
        'mimicry_kl': kl_K,
        'auxiliary_cross_entropy': entropy,
    }


class Attention(nn.Module):
    """The attention of OKDDip: softmax_j(q_k . v_j) of all networks but the last.

    q and v are linear in the pooled map, without bias, to an eighth of its channels. Networks with
    equally many channels share them, as in the authors' code; the others are brought to the
    smallest number.
    """

    layers: Layers

    @nn.compact
    def __call__(
        self, logits_KxBxC: jax.Array, maps: Sequence[jax.Array], train: bool
    ) -> jax.Array:
        """Returns the weight of network j in the target of network k: [B, K - 1, K - 1]."""
        pooled = [_pooled(own) for own in maps[:-1]]
        size = max(1, min(own.shape[-1] for own in pooled) // 8)
        projected = []
        for kind in ('query', 'value'):
            widths = sorted({own.shape[-1] for own in pooled})
            dense = {
                width: nn.Dense(
                    size, use_bias=False, dtype=self.layers.dtype, name=f'{kind}_{width}'
                )
                for width in widths
            }
            projected.append(jnp.stack([dense[own.shape[-1]](own) for own in pooled], axis=1))
        query, value = map(at_least_float32, projected)
        return nn.softmax(jnp.einsum('bkd,bjd->bkj', query, value))


def okddip_loss(
    attention_BxKxK: jax.Array, logits_KxBxC: jax.Array, labels_B: jax.Array, terms: Terms
) -> tuple[jax.Array, Values]:
    """Returns w sum_k KL_T(t_k -> z_k), and values.

    t_k = sum_j a_kj sg z_j for all networks but the last; that of the last, the leader, is sg of
    the mean of the others. The gradient reaches the attention, but no other network's logits.
    Source: OKDDip, Chen et al. 2020, network-based. The authors' code stops no gradient.
    """
    peers_KxBxC = jax.lax.stop_gradient(logits_KxBxC[:-1])
    targets_KxBxC = jnp.einsum('bkj,jbc->kbc', attention_BxKxK, peers_KxBxC)
    targets_KxBxC = jnp.concatenate([targets_KxBxC, peers_KxBxC.mean(0, keepdims=True)])
    kl_K = terms.kl(logits_KxBxC, targets_KxBxC)
    return terms.weight * kl_K.sum(), {'mimicry_kl': kl_K}


class Fusion(nn.Module):
    """The fusion module of FFL: a classifier of the concatenated maps.

    Depthwise 3x3 - BatchNorm - ReLU - 1x1 - BatchNorm - ReLU - mean - Dense. The 1x1 convolution
    has as many channels as the widest map; larger maps are average-pooled to the smallest.
    """

    layers: Layers
    classes: int

    @nn.compact
    def __call__(
        self, logits_KxBxC: jax.Array, maps: Sequence[jax.Array], train: bool
    ) -> jax.Array:
        """Returns the fused logits, [B, C]."""
        shape = min(own.shape[1] for own in maps), min(own.shape[2] for own in maps)
        x = jnp.concatenate([average_pool(own, shape) for own in maps], axis=-1)
        channels = x.shape[-1]
        x = self.layers.conv(channels, (3, 3), padding=1, feature_group_count=channels)(x)
        x = nn.relu(self.layers.norm(use_running_average=not train)(x))
        x = self.layers.conv(max(own.shape[-1] for own in maps), (1, 1))(x)
        x = nn.relu(self.layers.norm(use_running_average=not train)(x))
        return at_least_float32(nn.Dense(self.classes, dtype=self.layers.dtype)(_pooled(x)))


def ffl_loss(
    fused_BxC: jax.Array, logits_KxBxC: jax.Array, labels_B: jax.Array, terms: Terms
) -> tuple[jax.Array, Values]:
    """Returns CE(z_f) + w (sum_k KL_T(sg z_f -> z_k) + KL_T(sg mean z -> z_f)), and values.

    Source: FFL, Kim et al. 2020; there, branches of one network, and 1e-7 is added to the targets.
    """
    entropy = terms.cross_entropy(fused_BxC)
    kl_K = terms.kl(logits_KxBxC, jax.lax.stop_gradient(fused_BxC)[None])
    fused_kl = terms.kl(fused_BxC, jax.lax.stop_gradient(logits_KxBxC.mean(0)))
    return entropy + terms.weight * (kl_K.sum() + fused_kl), {
        'mimicry_kl': kl_K,
        'auxiliary_cross_entropy': entropy,
        'auxiliary_kl': fused_kl,
    }


class Embeddings(nn.Module):
    """The projection heads of MCL: Dense 128 - ReLU - Dense 128 of a network's pooled map."""

    layers: Layers
    size: int = 128

    @nn.compact
    def __call__(
        self, logits_KxBxC: jax.Array, maps: Sequence[jax.Array], train: bool
    ) -> jax.Array:
        """Returns the embeddings, of length 1: [K, B, size]."""
        embeddings = []
        for own in maps:
            x = nn.relu(nn.Dense(self.size, dtype=self.layers.dtype)(_pooled(own)))
            x = at_least_float32(nn.Dense(self.size, dtype=self.layers.dtype)(x))
            squares = jnp.square(x).sum(-1, keepdims=True)
            embeddings.append(x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12)))
        return jnp.stack(embeddings)


_CONTRASTIVE_TEMPERATURE, _CONTRASTIVE_WEIGHT = 0.1, 0.1


def mcl_loss(
    embeddings_KxBxD: jax.Array, logits_KxBxC: jax.Array, labels_B: jax.Array, terms: Terms
) -> tuple[jax.Array, Values]:
    """Returns w sum_k (0.1 (VCL_k + ICL_k) + soft VCL_k + soft ICL_k), and values.

    S_kj = v_k v_j' / 0.1 compares the images of the batch as networks k and j embed them. With a an
    image and b another image of the global batch, P(a) those of a's class,
      supervised(S) = - mean_a mean_{b in P(a)} log (exp S[a, b] / sum_{b != a} exp S[a, b]),
      VCL_k = supervised(S_kk), ICL_k = sum_{j != k} supervised(S_kj),
      soft VCL_k = sum_{j != k} KL_T(sg S_jj -> S_kk),
      soft ICL_k = sum_{j != k} KL_T(sg S_jk -> S_kj), where KL_T is of the rows.
    Masked pairs: an image's own column, b = a, is left out of VCL and, as in the authors' code, of
    ICL, where it is the same image seen by another network; it is part of the soft terms. An image
    that is alone in its class adds 0 to VCL and ICL, whose mean is over all images; the authors'
    batches have two images of each class. Source: MCL, Yang et al. 2022.
    """
    all_KxAxD = whole_batch(embeddings_KxBxD, axis=1)
    similarity_KxJxBxA = jnp.einsum('kbd,jad->kjba', embeddings_KxBxD, all_KxAxD)
    similarity_KxJxBxA /= _CONTRASTIVE_TEMPERATURE
    all_labels_A = whole_batch(labels_B)
    other_BxA = batch_index(len(labels_B))[:, None] != jnp.arange(len(all_labels_A))[None]
    positive_BxA = other_BxA & (labels_B[:, None] == all_labels_A[None])
    count_B = jnp.maximum(positive_BxA.sum(1), 1)

    among_others = jnp.where(other_BxA[None, None], similarity_KxJxBxA, -jnp.inf)
    log_p = similarity_KxJxBxA - jax.nn.logsumexp(among_others, axis=-1, keepdims=True)
    supervised_KxJxB = -jnp.where(positive_BxA[None, None], log_p, 0).sum(-1) / count_B[None, None]
    contrastive_K = supervised_KxJxB.mean(-1).sum(1)

    taught = jax.lax.stop_gradient(similarity_KxJxBxA)
    own_K = np.arange(len(embeddings_KxBxD))
    soft_K = jnp.zeros_like(contrastive_K)
    for hop in own_K[1:]:
        other_K = np.roll(own_K, hop)
        soft_K += terms.kl(similarity_KxJxBxA[own_K, own_K], taught[other_K, other_K])
        soft_K += terms.kl(similarity_KxJxBxA[own_K, other_K], taught[other_K, own_K])
    return terms.weight * (_CONTRASTIVE_WEIGHT * contrastive_K + soft_K).sum(), {
        'contrastive': contrastive_K,
        'contrastive_kl': soft_K,
    }


class Weights(nn.Module):
    """The weights of KDCL-General: no parameters, but a variable that evaluations set."""

    networks: int

    @nn.compact
    def __call__(
        self, logits_KxBxC: jax.Array, maps: Sequence[jax.Array], train: bool
    ) -> jax.Array:
        """Returns the weights, [K], at first 1 / K."""
        start = functools.partial(jnp.full, self.networks, 1 / self.networks)
        return self.variable('batch_stats', 'weights', start).value


def general_loss(
    weights_K: jax.Array, logits_KxBxC: jax.Array, labels_B: jax.Array, terms: Terms
) -> tuple[jax.Array, Values]:
    """Returns w sum_k KL_T(sg t -> z_k), t = log sum_k w_k softmax(z_k), and values.

    Source: KDCL-General, Guo et al. 2020.
    """
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(logits_KxBxC))
    target_BxC = jax.nn.logsumexp(log_p, axis=0, b=weights_K[:, None, None])
    kl_K = terms.kl(logits_KxBxC, target_BxC[None])
    return terms.weight * kl_K.sum(), {'mimicry_kl': kl_K, 'teacher_weight': weights_K}


def error_products(log_p_KxBxC: jax.Array, labels_B: jax.Array, mask_B: jax.Array) -> jax.Array:
    """Returns the sum over the masked images of <p_k - y, p_j - y>, y the one-hot label: [K, K]."""
    errors_KxBxC = jnp.exp(log_p_KxBxC) - jax.nn.one_hot(labels_B, log_p_KxBxC.shape[-1])[None]
    errors_KxBxC = jnp.where(mask_B[None, :, None], errors_KxBxC, 0)
    return jnp.einsum('kbc,jbc->kj', errors_KxBxC, errors_KxBxC)


def general_weights(products_KxK: np.ndarray, images: int) -> dict[str, np.ndarray]:
    """Returns w = C^-1 1 / (1' C^-1 1), C = products / images, and negative ones as 0: [K].

    They are scaled to the sum 1 again, because the target is a logarithm: our choice. Of equal
    networks C has no inverse; its pseudo-inverse gives equal weights.
    Source: KDCL-General, Guo et al. 2020.
    """
    uniform = np.full(len(products_KxK), 1 / len(products_KxK), np.float32)
    if not np.isfinite(products_KxK).all():
        return {'weights': uniform}
    weights = np.linalg.pinv(products_KxK / images, hermitian=True).sum(1).clip(0)
    total = weights.sum()
    return {'weights': (weights / total).astype(np.float32) if total > 0 else uniform}


AUXILIARIES = {
    'one': Auxiliary(
        lambda layers, networks, classes: Gate(layers, networks),
        one_loss,
        step_names=('auxiliary_cross_entropy',),
    ),
    'okddip': Auxiliary(lambda layers, networks, classes: Attention(layers), okddip_loss, least=3),
    'ffl': Auxiliary(
        lambda layers, networks, classes: Fusion(layers, classes),
        ffl_loss,
        step_names=('auxiliary_cross_entropy', 'auxiliary_kl'),
    ),
    'mcl': Auxiliary(
        lambda layers, networks, classes: Embeddings(layers),
        mcl_loss,
        names=('contrastive', 'contrastive_kl'),
    ),
    'kdcl_general': Auxiliary(
        lambda layers, networks, classes: Weights(networks),
        general_loss,
        names=('mimicry_kl', 'teacher_weight'),
        held_out=general_weights,
    ),
}
