"""Numbers in the names of networks: depths and width multipliers."""

from afkd_jax.errors import UserError


def blocks(name: str, depth: str, offset: int) -> int:
    """Returns n, at least 1, of a network of depth 6n + `offset`; of other depths a UserError."""
    n, rest = divmod(int(depth) - offset, 6)
    if n >= 1 and not rest:
        return n
    below = 6 * max(n, 1) + offset
    near = [name.replace(depth, str(d), 1) for d in (below, below + 6)]
    raise UserError(
        f'config.networks: "{name}" has depth {depth}, but these networks have depth '
        f'6n + {offset}; nearest: "{near[0]}" and "{near[1]}"'
    )


def at_least_1(name: str, what: str, number: str) -> int:
    """Returns the number; below 1 it is a UserError that names it."""
    if int(number) < 1:
        raise UserError(f'config.networks: "{name}" has {what} {int(number)}; the smallest is 1')
    return int(number)
