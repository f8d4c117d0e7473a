"""Image files in folders, as ImageNet is commonly unpacked.

DIR/train/<class>/... and one of DIR/test, DIR/val, DIR/validation, likewise: the first of these
that has class folders. Every file below a class folder whose name ends like an image's is one, at
any depth; hidden files and folders are passed over, and links to folders below a class folder.
Classes are numbered in the order of their names, compared as bytes, and so are the images of a
split.
"""

import hashlib
import os
import pathlib

import numpy as np
from PIL import Image

from afkd_jax.data.examples import Examples
from afkd_jax.errors import UserError

_ENDINGS = (b'.jpg', b'.jpeg', b'.png', b'.webp', b'.bmp', b'.gif', b'.tif', b'.tiff')
_TEST_NAMES = ('test', 'val', 'validation')


def _folders(folder: pathlib.Path) -> list[bytes]:
    """Returns the names of the folders in a folder, in order, without hidden ones."""
    with os.scandir(os.fsencode(folder)) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(b'.'))


def _refuse(error: OSError) -> None:
    raise error


def _files(folder: bytes) -> list[bytes]:
    """Returns the images below a folder, as paths relative to it, in order."""
    found = []
    for where, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(b'.')]
        found += [
            os.path.relpath(os.path.join(where, name), folder)
            for name in names
            if name.lower().endswith(_ENDINGS) and not name.startswith(b'.')
        ]
    return sorted(found)


class _Files(Examples):
    """The image files of one split.

    Args:
      root: of the split.
      labels: of its class folders.
    """

    def __init__(self, root: pathlib.Path, labels: dict[bytes, int]):
        self._root, self._folders = os.fsencode(root), list(labels)
        files = [_files(os.path.join(self._root, name)) for name in labels]
        self._folder = np.repeat(np.arange(len(files)), [len(names) for names in files])
        self._labels = np.array([*labels.values()], np.int32)[self._folder]
        # One array and no list: a million names are 50 MB, which every worker is sent.
        self._files = np.array([name for names in files for name in names], 'S')

    def __len__(self) -> int:
        return len(self._labels)

    def _path(self, index: int) -> bytes:
        folder = self._folders[self._folder[index]]
        return os.path.join(self._root, folder, bytes(self._files[index]))

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self._path(index), 'rb') as file:
            return file.read(), int(self._labels[index])

    def read_labels(self) -> np.ndarray:
        """Returns the labels, known from the names alone."""
        return self._labels

    def name(self, index: int) -> str:
        """Returns its path."""
        return os.fsdecode(self._path(index))

    def fingerprint(self) -> str:
        """Returns a hash of all names and labels, not of what the files hold."""
        digest = hashlib.sha256(repr((self._folders, self._files.dtype.str)).encode())
        for array in (self._files, self._folder, self._labels):
            digest.update(np.ascontiguousarray(array).view(np.uint8))
        return digest.hexdigest()

    def first_shape(self) -> tuple[int, int, int]:
        """Returns (height, width, channels) of the first image."""
        try:
            with Image.open(self.name(0)) as file:
                width, height = file.size
                return height, width, 1 if file.mode in ('1', 'L', 'LA') else 3
        except Exception as error:  # of a broken file Pillow raises whatever its decoders do
            raise UserError(
                f'config.dataset: {self.name(0)} is no image ({error}); mend or remove it'
            ) from error


def examples(directory: str, resized: bool) -> tuple[Examples, Examples, int]:
    """Returns the images of train and of test, and the number of classes.

    Args:
      directory: holds the folders of the splits.
      resized: whether all will be resized to one size; then they are seen in colour, whatever the
        first one is. Otherwise its size and colours are those of all.

    Raises:
      UserError: a folder is missing or empty, or the classes of the splits differ.
    """
    root = pathlib.Path(directory).expanduser()
    expected = f'{root}/train/CLASS/... and {root}/val/CLASS/... are expected'
    if not (root / 'train').is_dir():
        raise UserError(f'config.dataset: there is no directory {root / "train"}; {expected}')
    classes = _folders(root / 'train')
    if len(classes) < 2:
        raise UserError(
            f'config.dataset: two class folders are needed in {root / "train"}, but there '
            f'are {len(classes)}; {expected}'
        )
    for name in _TEST_NAMES:
        if (root / name).is_dir() and (there := _folders(root / name)):
            break
    else:
        raise UserError(
            f'config.dataset: none of {", ".join(_TEST_NAMES)} in {root} has class folders; '
            f'{expected}'
        )
    if unknown := [os.fsdecode(folder) for folder in there if folder not in {*classes}]:
        raise UserError(
            f'config.dataset: {root / name} has the class {unknown[0]!r}, which {root / "train"} '
            'has not; the classes must be the same'
        )
    labels = {folder: label for label, folder in enumerate(classes)}
    train = _Files(root / 'train', labels)
    test = _Files(root / name, {folder: labels[folder] for folder in there})
    for split, folder in ((train, 'train'), (test, name)):
        if not len(split):
            raise UserError(
                f'config.dataset: there are no image files below {root / folder}; remove that '
                f'folder if another is meant: {expected}'
            )
    if empty := set(range(len(classes))) - set(train.read_labels().tolist()):
        folder = os.fsdecode(classes[min(empty)])
        raise UserError(
            f'config.dataset: there are no image files below {root / "train" / folder}; every '
            'class needs some'
        )
    shape = (None, None, 3) if resized else train.first_shape()
    train.image_shape = test.image_shape = shape
    return train, test, len(classes)
