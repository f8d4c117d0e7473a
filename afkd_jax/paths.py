"""Paths that the user names: ~ is expanded, and what cannot be used is rejected."""

import pathlib
import re
import sys

from afkd_jax.errors import UserError


def local(name: str, text: str | pathlib.Path) -> pathlib.Path:
    """Returns the path that an option or field gives.

    Args:
      name: of the option or field, as in '--workdir'.
      text: its value.

    Raises:
      UserError: it is an address, as of a cloud store; or there is no such user as in ~user.
    """
    if re.match(r'[A-Za-z][\w+.-]*:/', str(text)):
        raise UserError(
            f'{name}: {text} is an address, not a path; mount that store and name the directory '
            'where it is mounted'
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f'{name}: {text} lies in a home directory that is not known; write out the path'
        ) from None


def directory(name: str, text: str | pathlib.Path) -> pathlib.Path:
    """Returns local() of a directory that libraries in C++ read and write too.

    Raises:
      UserError: see local(); or its name cannot be passed to them, or it is a link to nowhere.
    """
    path = local(name, text)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{name}: the name {path} is not valid {sys.getfilesystemencoding()}; name another '
            'directory, or use a UTF-8 locale'
        ) from None
    if path.is_symlink() and not path.exists():
        raise UserError(
            f'{name}: {path} is a link to {path.readlink()}, which does not exist; make that '
            'directory, or name another'
        )
    return path
