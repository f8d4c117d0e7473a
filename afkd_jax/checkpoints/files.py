"""Files that are written whole or not at all, and what is set aside instead of deleted."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, TextIO


def write_atomic(path: pathlib.Path, content: bytes) -> None:
    """Writes the file whole or not at all, even when the machine loses power."""
    temporary = path.with_name(path.name + '.tmp')
    with temporary.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def created(path: pathlib.Path) -> Iterator[TextIO]:
    """Opens a text file that gets its name at the end; after an error nothing of it is left."""
    unfinished = path.with_name(path.name + '.unfinished')
    try:
        with unfinished.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
            yield file
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
