"""Files that are written whole or not at all, and what is set aside instead of deleted."""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def _renamed(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the name under which a file is written; after an error nothing of it is left."""
    # Another process, as a worker of the same study, may write the same file.
    unfinished = path.with_name(f'{path.name}.{secrets.token_hex(4)}.tmp')
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.filename in (None, str(unfinished)):  # None of a full disk
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # it has its name, or could not be made
            unfinished.unlink()


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Writes the file whole or not at all, even when the machine loses power."""
    with _renamed(path) as temporary, temporary.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def created(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a text file that gets its name at the end; after an error nothing of it is left."""
    options: Any = {'newline': '', 'encoding': 'utf-8', 'errors': 'backslashreplace'}
    with _renamed(path) as unfinished, unfinished.open('w', **options) as file:
        yield file


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all, as JSON; a list without further ones is one line."""
    write_atomic(path, (_pretty(value, '\n') + '\n').encode())


def _pretty(value: Any, newline: str) -> str:
    """Returns JSON, indented as `newline`, in which the row of a matrix is one line."""
    inner = newline + '  '
    if isinstance(value, dict) and value:
        rows = [f'{json.dumps(key)}: {_pretty(one, inner)}' for key, one in value.items()]
        return f'{{{inner}{f",{inner}".join(rows)}{newline}}}'
    if isinstance(value, (list, tuple)) and any(
        isinstance(one, (dict, list, tuple)) for one in value
    ):
        return f'[{inner}{f",{inner}".join(_pretty(one, inner) for one in value)}{newline}]'
    return json.dumps(value, allow_nan=False)


def set_aside(workdir: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Moves what the run cannot use, but nobody may lose, to workdir/set_aside; returns where."""
    target = workdir / 'set_aside' / path.relative_to(workdir)
    target.parent.mkdir(parents=True, exist_ok=True)
    free, count = target, 1
    while free.exists():
        count += 1
        free = target.with_name(f'{target.name}.{count}')
    _move(path, free)
    return free


def _move(path: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file or directory; to another file system it is copied, whole, and then deleted."""
    try:
        path.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(target.name + '.unfinished')
        if path.is_dir():
            shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
            shutil.copytree(path, copy)
            copy.rename(target)
            shutil.rmtree(path)
        else:
            shutil.copy2(path, copy)
            copy.rename(target)
            path.unlink()
