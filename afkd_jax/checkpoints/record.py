"""The record of a checkpoint: what it is, and checksums by which one that is not whole is known."""

import hashlib
import json
import pathlib
from typing import Any

from afkd_jax.checkpoints import workdir as workdir_lib

_NAME = 'record.json'
_KEYS = {'step', 'progress', 'origin', 'versions', 'devices', 'digests', 'files'}


class Unfit(Exception):
    """Why a checkpoint cannot be used: the end of a sentence that begins with its name."""


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes the record of a checkpoint whose other files are complete.

    Args:
      folder: of the checkpoint.
      content: what is recorded, as JSON; 'files' is added, path -> SHA-256 of each other file.
    """
    content = {**content, 'files': _files(folder)}
    workdir_lib.write_json(folder / _NAME, {'content': content, 'sha256': _digest(content)})


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a checkpoint's record holds, if it and all files are as they were written.

    Raises:
      Unfit: the record or a file is missing, cut or altered, or the record is another version's.
    """
    try:
        record = json.loads((folder / _NAME).read_bytes())
        content, digest = record['content'], record['sha256']
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unfit(f'has no readable {_NAME} ({first_words(error)})') from error
    if _digest(content) != digest:
        raise Unfit(f'has a {_NAME} that was altered (its checksum differs)')
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise Unfit('was written by another version of this program')
    try:
        files = _files(folder)
    except OSError as error:  # of a failing disk, say
        raise Unfit(f'cannot be read ({first_words(error)})') from error
    for name, digest in content['files'].items():
        if files.get(name) != digest:
            how = 'was altered (its checksum differs)' if name in files else 'is missing'
            raise Unfit(f'is damaged: its file {name} {how}')
    return content


def first_words(error: BaseException) -> str:
    """Returns the first line of an error's text, cut to a readable length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 300 else f'{line[:300]} ...'


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: pathlib.Path) -> dict[str, str]:
    """Returns relative path -> SHA-256 of every file of a checkpoint but its record."""
    digests = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and path != folder / _NAME:
            with path.open('rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            digests[str(path.relative_to(folder))] = digest
    return digests
