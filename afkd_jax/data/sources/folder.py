"""Image files in folders, as ImageNet is commonly unpacked.

DIR/train/<class>/... and DIR/test/<class>/... and, as the validation split, one of DIR/val,
DIR/validation and DIR/valid; without DIR/test that is the test split. Folders without class folders
do not count. Every file
below a class folder, at any depth, with the extension of an image counts. Hidden files and folders
are skipped, and links to folders below a class folder. Classes and images are numbered in the order
of their names, compared as bytes.
"""

import os
import pathlib
from collections.abc import Sequence

import numpy as np

from afkd_jax import paths
from afkd_jax.config import Config
from afkd_jax.data import decode
from afkd_jax.data.examples import Examples, digest
from afkd_jax.data.sources import Source
from afkd_jax.errors import UserError

_ENDINGS = (b'.jpg', b'.jpeg', b'.png', b'.webp', b'.bmp', b'.gif', b'.tif', b'.tiff')
_HELD_OUT_NAMES = ('test', 'val', 'validation', 'valid')


def _folders(folder: pathlib.Path) -> list[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(b'.'))


def _raise(error: OSError) -> None:
    raise error


def image_files(folder: bytes) -> list[bytes]:
    """Returns the image files below a folder, as paths relative to it, sorted."""
    found = []
    for where, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(b'.')]
        found += [
            os.path.relpath(os.path.join(where, name), folder)
            for name in names
            if name.lower().endswith(_ENDINGS) and not name.startswith(b'.')
        ]
    return sorted(found)


class _Files(Examples):
    """The image files below the class folders (name -> label) of one split."""

    def __init__(self, root: pathlib.Path, labels: dict[bytes, int]):
        self._folders = list(labels)
        self._paths = [os.path.join(os.fsencode(root), name) for name in labels]
        files = [image_files(path) for path in self._paths]
        self._folder = np.repeat(np.arange(len(files)), [len(names) for names in files])
        self._labels = np.array([*labels.values()], np.int32)[self._folder]
        # An array instead of a list: a million names are 50 MB, sent to every worker process.
        self._files = np.array([name for names in files for name in names], 'S')

    def __len__(self) -> int:
        return len(self._labels)

    def _path(self, index: int) -> bytes:
        return b'%b/%b' % (self._paths[self._folder[index]], self._files[index])

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self._path(index), 'rb', buffering=0) as file:
            return file.read(), int(self._labels[index])

    def header(self, index: int) -> decode.Shape:
        """Returns the decode.header of an image."""
        with open(self._path(index), 'rb') as file:
            return decode.read_header(file)

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        return self._labels[indices]

    def name(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def fingerprint(self) -> str:
        description = self._folders, self._files.dtype.str
        return digest(description, self._files, self._folder, self._labels)


def _stored_shape(splits: Sequence[_Files]) -> decode.Shape:
    """Returns the size of the first image that can be read, and one channel if all are grey.

    Reads the headers up to the first image with colours. One that cannot be read does not count.
    """
    size, reason = None, ''
    for split, index in ((files, i) for files in splits for i in range(len(files))):
        try:
            height, width, channels = split.header(index)
        except decode.DecodeError as error:
            reason = reason or str(error)
            continue
        size = size or (height, width)
        if channels == 3:
            return *size, 3
    if not size:
        raise UserError(
            f'config.dataset: none of the {sum(map(len, splits))} images can be read; the first is '
            f'{splits[0].name(0)}: {reason}; repair them'
        )
    return *size, 1


def source(config: Config, argument: str) -> Source:
    """Returns the image files below the directory `argument`; classes are named by folder.

    With config.data.image_size all images are decoded as RGB; else they are grey if every one is,
    and RGB if one is not.

    Raises:
      UserError: a folder is missing or empty, or the classes of the splits differ.
    """
    root = paths.local('config.dataset', argument)
    expected = f'{root}/train/CLASS/... and {root}/val/CLASS/... are expected'
    train_root = root / 'train'
    if not train_root.is_dir():
        raise UserError(f'config.dataset: there is no directory {train_root}; {expected}')
    classes = _folders(train_root)
    if len(classes) < 2:
        raise UserError(
            f'config.dataset: two class folders are needed in {train_root}, but there are '
            f'{len(classes)}; {expected}'
        )
    held_out = {
        name: folders
        for name in _HELD_OUT_NAMES
        if (root / name).is_dir() and (folders := _folders(root / name))
    }
    if not held_out:
        raise UserError(
            f'config.dataset: none of {", ".join(_HELD_OUT_NAMES)} in {root} has class folders; '
            f'{expected}'
        )
    labels = {folder: label for label, folder in enumerate(classes)}
    if len(validation := [name for name in held_out if name != 'test']) > 1:
        raise UserError(
            f'config.dataset: {" and ".join(str(root / name) for name in validation)} have class '
            'folders, but one validation folder is expected; move the others elsewhere'
        )
    splits = []
    for name in ('train', *held_out):
        folders = held_out.get(name, classes)
        if unknown := [os.fsdecode(folder) for folder in folders if folder not in labels]:
            raise UserError(
                f'config.dataset: {root / name} has the class {unknown[0]!r}, which is not in '
                f'{train_root}; the classes must be the same'
            )
        splits.append(_Files(root / name, {folder: labels[folder] for folder in folders}))
        if not len(splits[-1]):
            raise UserError(
                f'config.dataset: there are no image files below {root / name}; remove that folder '
                f'if another is meant: {expected}'
            )
    train, test, *validation = splits
    if empty := set(range(len(classes))) - set(train.read_labels(np.arange(len(train))).tolist()):
        folder = os.fsdecode(classes[min(empty)])
        raise UserError(
            f'config.dataset: there are no image files below {train_root / folder}; every class '
            'needs some'
        )
    shape = (None, None, 3) if config.data.image_size else _stored_shape(splits)
    for split in splits:
        split.image_shape = shape
    names = tuple(name.decode(errors='backslashreplace') for name in classes)
    return Source(train, test, names, *validation)
