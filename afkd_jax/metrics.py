"""Device side of the metrics: sums over steps, so that nothing is fetched step by step."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Sums:
    """Sums of a step's values over steps.

    Attributes:
      steps: int32 scalar, how many steps were added.
      totals: name -> [K], one per network, or a scalar, one per step.
    """

    steps: jax.Array
    totals: dict[str, jax.Array]


def zeros(shapes: dict[str, tuple[int, ...]]) -> Sums:
    """Returns empty sums for values of these names and shapes."""
    return Sums(jnp.int32(0), {name: jnp.zeros(shape) for name, shape in shapes.items()})


def add(sums: Sums, values: dict[str, jax.Array]) -> Sums:
    """Returns the sums with one step's values added; the names must be the same."""
    return Sums(sums.steps + 1, jax.tree.map(jnp.add, sums.totals, values))


def means(sums: Sums) -> dict[str, list[float] | float]:
    """Fetches the sums and returns name -> means over the steps; waits until they are there."""
    host = jax.device_get(sums)
    return {name: (total / host.steps).tolist() for name, total in host.totals.items()}
