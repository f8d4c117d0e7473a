"""The record of a checkpoint: its contents, and the checksums that detect damage."""

import hashlib
import json
import pathlib
from typing import Any

from afkd_jax.checkpoints.files import write_json
from afkd_jax.errors import first_line

_NAME = 'record.json'
_KEYS = {'step', 'progress', 'origin', 'versions', 'devices', 'digests', 'files'}


class Unusable(Exception):
    """Why a checkpoint cannot be used; completes a message that begins with its name."""


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes the record of a checkpoint whose other files are complete.

    Args:
      folder: of the checkpoint.
      content: as JSON; 'files' is added, path -> SHA-256 of each other file.
    """
    content = {**content, 'files': _files(folder)}
    write_json(folder / _NAME, {'content': content, 'sha256': _digest(content)})


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the content of the record, if it and all files are as they were written.

    Raises:
      Unusable: the record or a file is missing, cut or altered, or the record is another version's.
    """
    try:
        record = json.loads((folder / _NAME).read_bytes())
        content, digest = record['content'], record['sha256']
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unusable(f'has no readable {_NAME} ({first_line(error)})') from error
    if _digest(content) != digest:
        raise Unusable(f'has a {_NAME} that was altered (its checksum differs)')
    if not isinstance(content, dict) or content.keys() != _KEYS:
        raise Unusable('was written by another version of this program')
    try:
        files = _files(folder)
    except OSError as error:  # e.g. a failing disk
        raise Unusable(f'cannot be read ({first_line(error)})') from error
    for name, digest in content['files'].items():
        if files.get(name) != digest:
            how = 'was altered (its checksum differs)' if name in files else 'is missing'
            raise Unusable(f'is damaged: its file {name} {how}')
    return content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: pathlib.Path) -> dict[str, str]:
    """Returns relative path -> SHA-256 of every file of a checkpoint except its record."""
    digests = {}
    for path in sorted(folder.rglob('*')):
        if path.is_file() and path != folder / _NAME:
            with path.open('rb') as file:
                digest = hashlib.file_digest(file, 'sha256').hexdigest()
            digests[str(path.relative_to(folder))] = digest
    return digests
