"""The four gzip IDX files of the MNIST family, in one directory."""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from afkd_jax.data.examples import Images
from afkd_jax.errors import UserError

_FILES = (
    ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
    ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
)


def _read(path: pathlib.Path, axes: int) -> np.ndarray:
    """Returns a gzip IDX file of unsigned bytes as an array with `axes` axes."""
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * axes)
            if header[:4] != bytes((0, 0, 8, axes)):
                raise UserError(
                    f'config.dataset: {path} starts with {header[:4].hex()}, but an IDX file of '
                    f'bytes with {axes} axes starts with 000008{axes:02x}; fetch it again'
                )
            if len(header) < 4 + 4 * axes:
                raise UserError(f'config.dataset: {path} ends in its header; fetch it again')
            shape = struct.unpack(f'>{axes}I', header[4:])
            size = math.prod(shape)
            # One byte more than announced, so that a longer file is noticed; piece by piece, so
            # that a header that claims too much costs only the memory of what its file holds.
            data = bytearray()
            while piece := file.read(min(size + 1 - len(data), 2**20)):
                data += piece
    except FileNotFoundError:
        raise UserError(
            f'config.dataset: there is no file {path}; an idx: directory holds '
            + ', '.join(name for pair in _FILES for name in pair)
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f'config.dataset: {path} cannot be read as gzip ({error}); fetch it again'
        ) from None
    if len(data) != size:
        raise UserError(
            f'config.dataset: {path} announces {"x".join(map(str, shape))} bytes but holds '
            f'{"more" if len(data) > size else len(data)}; fetch it again'
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def load(directory: str) -> tuple[Images, Images, int]:
    """Returns the images of train and of test, and the number of classes.

    Args:
      directory: holds the four files.

    Raises:
      UserError: the directory or a file is not there, broken, or does not fit the others.
    """
    folder, splits = pathlib.Path(directory).expanduser(), []
    if not folder.is_dir():
        raise UserError(
            f'config.dataset: there is no directory {folder}; name one that holds the four '
            'gzip IDX files of the MNIST family (Debian: apt-get install dataset-fashion-mnist)'
        )
    for images_name, labels_name in _FILES:
        pixels = _read(folder / images_name, 3)
        labels = _read(folder / labels_name, 1).astype(np.int32)
        if len(pixels) != len(labels) or len(labels) == 0:
            raise UserError(
                f'config.dataset: {folder / images_name} has {len(pixels)} images but '
                f'{labels_name} has {len(labels)} labels; they must be equally many, and some'
            )
        splits.append(Images(pixels[..., None], labels))
    train, test = splits
    num_classes = int(train.labels.max()) + 1
    if num_classes < 2 or test.labels.max() >= num_classes:
        raise UserError(
            f'config.dataset: the labels in {folder} go to {num_classes - 1} in training and '
            f'to {test.labels.max()} in test; there must be two classes, the same in both'
        )
    if train.image_shape != test.image_shape:
        raise UserError(
            f'config.dataset: the training images in {folder} are {train.image_shape[:2]} but '
            f'the test images {test.image_shape[:2]}; they must be alike'
        )
    return train, test, num_classes
