"""What a user can correct: one exception class, and the nearest valid name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One sentence that names the thing, its value and the remedy; the exit code is 1."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns '; did you mean "x"?' for the valid name nearest to `name`, else the whole list."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return '; valid: ' + ', '.join(valid)
