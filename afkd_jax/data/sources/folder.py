"""Image files in folders, as ImageNet is commonly unpacked.

DIR/train/<class>/... and DIR/test/<class>/... and, as the validation split, one of DIR/val,
DIR/validation and DIR/valid; without DIR/test that is the test split. Folders without class folders
do not count. Every file below a class folder, at any depth, with the extension of an image counts.
Links are followed, except to a folder that contains them. Hidden files and folders are left out,
and what NAS and archive programs put beside images. Classes and images are numbered in the order of
their names, compared as bytes; names of classes in the splits are the same if they look the same.
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from afkd_jax import paths
from afkd_jax.config import Config
from afkd_jax.data import decode
from afkd_jax.data.examples import Examples, digest
from afkd_jax.data.sources import Source
from afkd_jax.errors import UserError

_ENDINGS = (
    *(b'.jpg', b'.jpeg', b'.jpe', b'.jfif'),
    *(b'.png', b'.webp', b'.bmp', b'.gif', b'.tif', b'.tiff'),
)
_HELD_OUT_NAMES = ('test', 'val', 'validation', 'valid')
# Folders with thumbnails, deleted files and the like, which are left out as hidden ones are.
_JUNK = (
    *(b'@eaDir', b'@Recycle', b'#recycle', b'#snapshot'),
    *(b'__MACOSX', b'$RECYCLE.BIN', b'System Volume Information', b'lost+found'),
)
_JUNK_FILES = (b'thumbs.db', b'desktop.ini')
_UNREADABLE = (errno.ENOENT, errno.EACCES, errno.EIO, errno.ELOOP)  # of an image, not of all


def _left_out(name: bytes) -> bool:
    return name.startswith(b'.') or name in _JUNK or name.lower() in _JUNK_FILES


def _folders(folder: pathlib.Path) -> list[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not _left_out(e.name))


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(_ENDINGS)


def class_name(name: bytes) -> str:
    """Returns the class of a folder; equal characters are equal bytes, unlike in file systems."""
    return unicodedata.normalize('NFC', name.decode(errors='backslashreplace'))


@dataclasses.dataclass
class Found:
    """What lies below a folder, as paths relative to it.

    Attributes:
      others: what is no image file, by its extension or kind, except what is always left out.
      loops: links to a folder that contains them.
    """

    images: list[bytes] = dataclasses.field(default_factory=list)
    others: list[bytes] = dataclasses.field(default_factory=list)
    loops: list[bytes] = dataclasses.field(default_factory=list)


def find(folder: bytes) -> Found:
    """Returns what lies below a folder, at any depth, sorted."""
    found = Found()

    def walk(path: bytes, inside: bytes, above: set[tuple[int, int]]) -> None:
        here = _identity(path)
        if here in above:
            found.loops.append(inside)
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if _left_out(entry.name):
                    continue
                name = os.path.join(inside, entry.name)
                if entry.is_dir():
                    walk(entry.path, name, {*above, here})
                else:
                    # A pipe or socket would be waited for; a link to nowhere is a broken image.
                    file = entry.is_file(follow_symlinks=False) or entry.is_symlink()
                    image = file and _is_image(entry.name)
                    (found.images if image else found.others).append(name)

    above = {
        parent for one in (os.path.abspath, os.path.realpath) for parent in _above(one(folder))
    }
    walk(folder, b'', set(map(_identity, above)))
    for names in (found.images, found.others, found.loops):
        names.sort()
    return found


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _above(path: bytes) -> set[bytes]:
    parent = os.path.dirname(path)
    return {parent} | (_above(parent) if parent != path else set())


class _Files(Examples):
    """The image files below the class folders (name -> label) of one split."""

    def __init__(self, root: pathlib.Path, labels: dict[bytes, int]):
        self._folders = list(labels)
        self._paths = [os.path.join(os.fsencode(root), name) for name in labels]
        found = [find(path) for path in self._paths]
        files = [one.images for one in found]
        self._folder = np.repeat(np.arange(len(files)), [len(names) for names in files])
        self._labels = np.array([*labels.values()], np.int32)[self._folder]
        # An array instead of a list: a million names are 50 MB, sent to every worker process.
        self._files = np.array([name for names in files for name in names], 'S')
        pairs = list(zip(self._paths, found, strict=True))
        self.others = [os.path.join(path, name) for path, one in pairs for name in one.others]
        self.loops = [os.path.join(path, name) for path, one in pairs for name in one.loops]

    def __len__(self) -> int:
        return len(self._labels)

    def _path(self, index: int) -> bytes:
        return b'%b/%b' % (self._paths[self._folder[index]], self._files[index])

    @contextlib.contextmanager
    def _open(self, index: int, buffering: int) -> Iterator[BinaryIO]:
        """Opens a file; one that is missing or cannot be read is an image that is broken."""
        try:
            with open(self._path(index), 'rb', buffering) as file:
                yield file
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            raise decode.DecodeError(f'it cannot be read ({error.strerror})') from error

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with self._open(index, 0) as file:
            return file.read(), int(self._labels[index])

    def header(self, index: int) -> decode.Shape:
        """Returns the decode.header of an image."""
        with self._open(index, -1) as file:
            return decode.read_header(file)

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        return self._labels[indices]

    def name(self, index: int) -> str:
        return os.fsdecode(self._path(index))

    def fingerprint(self) -> str:
        description = self._folders, self._files.dtype.str
        return digest(description, self._files, self._folder, self._labels)


def _notes(root: pathlib.Path, split: _Files) -> list[str]:
    """Returns a line about the files below a split's folder that are passed over, if there are."""
    with os.scandir(os.fsencode(root)) as entries:
        beside = sorted(e.path for e in entries if _is_image(e.name) and not _left_out(e.name))
    reasons = []
    for found, why in (
        (split.others, 'no files with the extension of an image'),
        (beside, 'in no class folder'),
        (split.loops, 'links to a folder that contains them'),
    ):
        if found:
            names = [os.fsdecode(os.path.relpath(path, os.fsencode(root))) for path in found[:3]]
            names += ['...'] if len(found) > 3 else []
            reasons.append(f'{len(found)} {why} ({", ".join(names)})')
    return [f'{root}: passed over: {"; ".join(reasons)}'] if reasons else []


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
    labels: dict[str, int] = {}
    for label, name in enumerate(map(class_name, classes)):
        if name in labels:
            raise UserError(
                f'config.dataset: {train_root} has two class folders that look the same, '
                f'{classes[labels[name]]!r} and {classes[label]!r}; rename or merge them'
            )
        labels[name] = label
    if len(validation := [name for name in held_out if name != 'test']) > 1:
        raise UserError(
            f'config.dataset: {" and ".join(str(root / name) for name in validation)} have class '
            'folders, but one validation folder is expected; move the others elsewhere'
        )
    splits = []
    for name in ('train', *held_out):
        folders = held_out.get(name, classes)
        if unknown := [
            os.fsdecode(folder) for folder in folders if class_name(folder) not in labels
        ]:
            raise UserError(
                f'config.dataset: {root / name} has the class {unknown[0]!r}, which is not in '
                f'{train_root}; the classes must be the same'
            )
        splits.append(
            _Files(root / name, {folder: labels[class_name(folder)] for folder in folders})
        )
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
    notes = [
        line
        for split, name in zip(splits, ('train', *held_out), strict=True)
        for line in _notes(root / name, split)
    ]
    return Source(train, test, tuple(labels), *(validation or [None]), notes=tuple(notes))
