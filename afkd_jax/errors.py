"""What a user can correct: one exception class, its usual form, and the exit codes."""

import difflib
from collections.abc import Iterable
from typing import Any

# Exit codes. 0: finished.
EXIT_USER_ERROR = 1  # an input to be corrected, or a run that has diverged
EXIT_BUG = 70  # a fault of this program
EXIT_RESUMABLE = 75  # stopped by a signal with a checkpoint: the same command resumes
EXIT_KILLED = 130  # interrupted outside training, or for the second time
EXIT_UNREAD = 141  # nobody reads the output any more, as after `| head`; training continues

_LISTED = 40  # valid names in an error message, at most


class UserError(Exception):
    """A one-line message that names the thing, its value and the remedy."""


def field_error(name: str, rule: str, value: Any) -> UserError:
    """Returns the error of a config field (dotted name) whose value breaks its rule."""
    return UserError(f'config.{name}: must be {rule}, but is {value!r}')


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns '; did you mean "x"?' if a valid name is close to `name`, else a list of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
    if close:
        return did_you_mean(close[0])
    more = f', ... ({len(valid)} in all)' if len(valid) > _LISTED else ''
    return f'; valid: {", ".join(valid[:_LISTED])}{more}'


def did_you_mean(name: str) -> str:
    """Returns the end of an error message that proposes a name."""
    return f'; did you mean "{name}"?'


def first_line(error: BaseException, most: int = 300) -> str:
    """Returns the first line of an exception's text, cut to `most`, or else its type."""
    line = ' '.join((str(error).strip().splitlines() or [''])[0].split()) or type(error).__name__
    return line if len(line) <= most else f'{line[:most]} ...'
