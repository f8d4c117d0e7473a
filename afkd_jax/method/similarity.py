"""Similarity of each network and its teacher (an edge of the ring): maps and predictions.

On the device: sums over a batch. On the host: the figures.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.devices.arrays import at_least_float32
from afkd_jax.devices.spmd import DATA
from afkd_jax.method.cohort import Cohort
from afkd_jax.method.state import NetworkState
from afkd_jax.method.step import evaluated
from afkd_jax.models.layers import last


def sums(
    cohort: Cohort,
    networks: tuple[NetworkState, ...],
    pixels_BxHxWxC: jax.Array,
    labels_B: jax.Array,
    mask_B: jax.Array,
) -> dict[str, jax.Array]:
    """Returns sums over the masked global batch, one per edge: [K], entry k of k and its teacher.

    images (a scalar); same, only_network_correct and only_teacher_correct, which count predictions;
    power, hsic_own and hsic_cross, see _hsic(). Where the maps have one shape, after the transfer
    layers if there are any: l1, l2 and cosine, see figures(). Arguments as of step.eval_step.
    """
    ring = cohort.ring
    outputs = [
        evaluated(module, state.variables(), pixels_BxHxWxC)
        for module, state in zip(cohort.networks, networks, strict=True)
    ]
    logits, maps_K = zip(*outputs, strict=True)
    own_maps = list(map(last, maps_K))
    predicted_KxB = jnp.stack(logits).argmax(-1)
    teacher_KxB = ring.teachers(predicted_KxB)
    correct_KxB, teacher_correct_KxB = (
        predictions == labels_B[None] for predictions in (predicted_KxB, teacher_KxB)
    )
    per_image = {
        'same': predicted_KxB == teacher_KxB,
        'only_network_correct': correct_KxB & ~teacher_correct_KxB,
        'only_teacher_correct': ~correct_KxB & teacher_correct_KxB,
    }
    maps = _in_one_shape(cohort, networks, maps_K)
    if maps is not None:
        per_image |= _distances(maps, ring.teachers(maps))
    totals = {name: jnp.where(mask_B[None], values, 0).sum(1) for name, values in per_image.items()}
    totals = jax.lax.psum(totals, DATA) | _hsic(cohort, own_maps, mask_B)
    return ring.gathered(totals) | {'images': jax.lax.psum(mask_B.sum(), DATA)}


def _in_one_shape(
    cohort: Cohort, networks: tuple[NetworkState, ...], maps: Sequence[Any]
) -> jax.Array | None:
    """Returns the maps as the method compares them, [K, B, H, W, C]; None if it cannot."""
    if not cohort.method.uses_maps and len(set(cohort.map_shapes)) > 1:
        return None
    shared: list[Any] = [
        evaluated(module, state.transfer_variables(), own) if module else own
        for own, module, state in zip(maps, cohort.transfers, networks, strict=True)
    ]
    return at_least_float32(jnp.stack(list(map(last, shared))))


def _distances(maps_KxBxHxWxC: jax.Array, teacher_maps: jax.Array) -> dict[str, jax.Array]:
    """Returns per image, [K, B]: mean |a - b|, mean (a - b)^2, and the cosine of the whole maps."""
    axes, difference = (2, 3, 4), maps_KxBxHxWxC - teacher_maps
    lengths = jnp.sqrt(jnp.square(maps_KxBxHxWxC).sum(axes) * jnp.square(teacher_maps).sum(axes))
    return {
        'l1': jnp.abs(difference).mean(axes),
        'l2': jnp.square(difference).mean(axes),
        'cosine': (maps_KxBxHxWxC * teacher_maps).sum(axes) / jnp.maximum(lengths, 1e-12),
    }


def _hsic(cohort: Cohort, maps: Sequence[jax.Array], mask_B: jax.Array) -> dict[str, jax.Array]:
    """Returns n HSIC_1(K_k, K_k) and n HSIC_1(K_k, K_p) of the global batch, n its images: [K].

    And `power`, the sum over the images of a map's squares, to separate HSIC from rounding.

    K_k is the matrix of inner products between the images' own maps, and HSIC_1 the unbiased
    estimator: its mean over random batches tends to that of the whole split, whatever their size;
    fewer than four images have none. Inner products have no need of a common shape.
    Source: Kornblith et al. 2019 (linear CKA); Nguyen, Raghu and Kornblith 2021, equation 3.
    """
    images = jax.lax.psum(mask_B.sum(), DATA).astype(at_least_float32(maps[0]).dtype)
    mask_all = jax.lax.all_gather(mask_B, DATA, tiled=True)
    index = jax.lax.axis_index(DATA) * len(mask_B) + jnp.arange(len(mask_B))
    pairs = mask_B[:, None] & mask_all[None] & (index[:, None] != jnp.arange(len(mask_all))[None])

    def inner_products(map_BxHxWxC):
        flat = map_BxHxWxC.reshape(len(map_BxHxWxC), -1)
        # HSIC does not change when the maps are centred, but its rounding errors do.
        total = jax.lax.psum(jnp.where(mask_B[:, None], flat, 0).sum(0), DATA)
        flat = flat - total[None] / images
        return jnp.where(pairs, flat @ jax.lax.all_gather(flat, DATA, tiled=True).T, 0)

    # This device's rows of the symmetric matrices; the sums over rows are completed by psum.
    rows = [inner_products(at_least_float32(own)) for own in maps]
    teachers = cohort.ring.teachers(jnp.stack(rows))

    def hsic(own, other):
        by_both = (own.sum(1) * other.sum(1)).sum()
        trace, by_own, by_other, by_both = jax.lax.psum(
            ((own * other).sum(), own.sum(), other.sum(), by_both), DATA
        )
        n = jnp.maximum(images, 4)
        value = trace + by_own * by_other / ((n - 1) * (n - 2)) - 2 / (n - 2) * by_both
        return jnp.where(images >= 4, value / (n - 3), 0)  # n HSIC_1 = value / (n - 3)

    squares = [jnp.square(at_least_float32(own)).sum((1, 2, 3)) for own in maps]
    power = jnp.stack([jnp.where(mask_B, square, 0).sum() for square in squares])
    return {
        'power': jax.lax.psum(power, DATA),
        'hsic_own': jnp.stack([hsic(own, own) for own in rows]),
        'hsic_cross': jnp.stack([hsic(*pair) for pair in zip(rows, teachers, strict=True)]),
    }


def figures(cohort: Cohort, parts: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Returns the figures of each edge, to the networks that learn; what is not defined is None.

    network, teacher: counted from 1.
    l1: mean |a - b| over images and elements of the maps as the method compares them (after the
      transfer layers, or None where shapes differ without them); l2: root of the mean (a - b)^2;
      cosine: mean over the images of the angle's cosine between whole maps, 0 for a map of zeros.
    cka: linear CKA of the networks' own maps, 1 for equal up to rotation and scale, near 0 for
      unrelated.
    agreement, disagreement, and of this only_network_correct and only_teacher_correct: percent of
      the images.

    `parts` are the sums() of every batch, on the host.
    Source: a third party says that the paper shows cosine, L1 and L2; the means are our choice.
    """
    total: dict[str, Any] = {
        name: np.sum([part[name] for part in parts], axis=0, dtype=np.float64) for name in parts[0]
    }
    images, edges = total['images'], []
    for k in filter(cohort.learns, range(len(cohort.names))):
        teacher = cohort.ring.teacher_of(k)
        edge: dict[str, Any] = {'network': k + 1, 'teacher': teacher + 1}
        for name in ('l1', 'l2', 'cosine'):
            edge[name] = float(total[name][k] / images) if name in total else None
        if edge['l2'] is not None:
            edge['l2'] = math.sqrt(edge['l2'])
        # A map that is the same for all images has no variance to compare, but for rounding.
        hsic, power = (total[name][[k, teacher]] for name in ('hsic_own', 'power'))
        varies = (hsic / images > 1e-12 * (power / images) ** 2).all()
        edge['cka'] = float(total['hsic_cross'][k] / math.sqrt(np.prod(hsic))) if varies else None
        edge['agreement'] = float(100 * total['same'][k] / images)
        edge['disagreement'] = 100 - edge['agreement']
        for name in ('only_network_correct', 'only_teacher_correct'):
            edge[name] = float(100 * total[name][k] / images)
        # The maps of a network that has diverged may not be finite; JSON has no number for that.
        for name, value in edge.items():
            if value is not None and not math.isfinite(value):
                edge[name] = None
        edges.append(edge)
    return edges
