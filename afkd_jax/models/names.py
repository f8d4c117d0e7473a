"""Numbers in the names of networks: depths and width multipliers."""

from afkd_jax.errors import UserError


def blocks(name: str, depth: int, offset: int) -> int:
    """Returns n, at least 1, of a network of depth 6n + `offset`.

    Args:
      name: of the network, with its depth.
      depth: in layers.
      offset: of the family.

    Raises:
      UserError: the family has no network of this depth.
    """
    n, rest = divmod(depth - offset, 6)
    if n >= 1 and not rest:
        return n
    below = 6 * max(n, 1) + offset
    near = [name.replace(str(depth), str(d), 1) for d in (below, below + 6)]
    raise UserError(
        f'config.networks: "{name}" has depth {depth}, but these networks have depth '
        f'6n + {offset}; nearest: "{near[0]}" and "{near[1]}"'
    )


def at_least_1(name: str, what: str, number: int) -> int:
    """Returns the number; below 1 it is a UserError that names it."""
    if number < 1:
        raise UserError(f'config.networks: "{name}" has {what} {number}; the smallest is 1')
    return number
