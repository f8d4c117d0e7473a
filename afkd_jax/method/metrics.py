"""Metrics: sums over steps on the device, so that nothing is fetched per step; and evaluations.

Steps with a value that is not finite are counted and left out of the sums; the values of the first
of them are stored for the error report.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Sums:
    """Sums of a step's values over steps, since they were last logged; counts are int32 scalars."""

    steps: jax.Array  # how many steps were added
    totals: dict[str, jax.Array]  # [K], one per network, or a scalar, one per step
    skipped: jax.Array  # how many steps were left out
    first_skipped: jax.Array  # the number (counted from 1) of the first of those; 0: none
    skipped_values: dict[str, jax.Array]  # of that step


def zeros(shapes: dict[str, tuple[int, ...]]) -> Sums:
    """Returns empty sums for values of these names and shapes, on the host."""
    totals, values = (
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)
    )
    zero: Any = np.int32(0)
    return Sums(zero, totals, zero, zero, values)  # pyright: ignore[reportArgumentType]


def finite(values: dict[str, jax.Array]) -> jax.Array:
    """Returns whether every value is finite: a bool scalar, on the device."""
    return jnp.stack([jnp.isfinite(value).all() for value in jax.tree.leaves(values)]).all()


def add(sums: Sums, values: dict[str, jax.Array], ok: jax.Array, step: jax.Array) -> Sums:
    """Returns the sums with one step's values; the step's number is counted from 1.

    Unless `ok`, a bool scalar, which is finite(values), the step is counted as skipped.
    """
    is_first = ~ok & (sums.skipped == 0)

    def where(condition: jax.Array, a: Any, b: Any) -> Any:
        return jax.tree.map(functools.partial(jnp.where, condition), a, b)

    return Sums(
        steps=sums.steps + ok,
        totals=where(ok, jax.tree.map(jnp.add, sums.totals, values), sums.totals),
        skipped=sums.skipped + ~ok,
        first_skipped=jnp.where(is_first, step, sums.first_skipped),
        skipped_values=where(is_first, values, sums.skipped_values),
    )


def means(sums: Sums) -> dict[str, list[float] | float]:
    """Returns name -> mean over the steps, at least one, of fetched sums."""
    return {name: (total / sums.steps).tolist() for name, total in sums.totals.items()}


CONFUSION_CLASSES = 100  # up to so many classes the confusion matrix is counted too
TOP5_CLASSES = 10  # above so many classes top-5 accuracy is counted too


def prediction_counts(
    log_p_KxBxC: jax.Array, labels_B: jax.Array, mask_B: jax.Array
) -> dict[str, jax.Array]:
    """Returns counts of predictions over the masked images, on the device: int32.

    correct [K, C]: correct predictions of each class; of equal probabilities the first class is the
      prediction.
    top5 [K], above TOP5_CLASSES classes: the label is among the five most probable classes.
    confusion [K, C, C], up to CONFUSION_CLASSES classes: label i predicted as j.
    """
    (networks, _, classes), int32 = log_p_KxBxC.shape, jnp.int32
    rows_Kx1, labels_1xB = jnp.arange(networks)[:, None], labels_B[None]
    own_KxBx1 = jnp.take_along_axis(log_p_KxBxC, labels_B[None, :, None], -1)
    before_C = jnp.arange(classes)[None, None] < labels_B[None, :, None]
    ahead = (log_p_KxBxC > own_KxBx1) | ((log_p_KxBxC == own_KxBx1) & before_C)
    ahead |= jnp.isnan(own_KxBx1)  # NaN is never correct
    rank_KxB = ahead.sum(-1)

    def among(first: int) -> jax.Array:
        return ((rank_KxB < first) & mask_B[None]).astype(int32)

    zeros = jnp.zeros((networks, classes), int32)
    counts = {'correct': zeros.at[rows_Kx1, labels_1xB].add(among(1))}
    if classes > TOP5_CLASSES:
        counts['top5'] = among(5).sum(1)
    if classes <= CONFUSION_CLASSES:
        zeros = jnp.zeros((networks, classes, classes), int32)
        where = rows_Kx1, labels_1xB, log_p_KxBxC.argmax(-1)
        counts['confusion'] = zeros.at[where].add(mask_B[None].astype(int32))
    return counts


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation on one split; each list holds the K networks and, last, the ensemble."""

    accuracy: list[float]  # top-1, percent
    cross_entropy: list[float]  # mean over the images, nats
    top5: list[float] | None  # percent; None for up to TOP5_CLASSES classes
    counts: dict[str, np.ndarray] | None = None  # sums of eval_step; None where not stored
    # label [N], predicted and confidence [N, K + 1] of the images, in order; None where not stored
    outputs: dict[str, np.ndarray] | None = None

    @classmethod
    def of(
        cls, counts: dict[str, np.ndarray], outputs: dict[str, np.ndarray] | None = None
    ) -> 'Evaluation':
        """Returns the evaluation of the sums over a whole split, and its images' outputs."""
        images = counts['images'].sum()
        return cls(
            (100 * counts['correct'].sum(1) / images).tolist(),
            (counts['cross_entropy'] / images).tolist(),
            (100 * counts['top5'] / images).tolist() if 'top5' in counts else None,
            counts,
            outputs,
        )
