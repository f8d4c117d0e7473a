"""The four gzip IDX files of the MNIST family, in one directory."""

import gzip
import math
import pathlib
import struct
import zlib
from typing import IO

import numpy as np

from afkd_jax import paths
from afkd_jax.config import Config
from afkd_jax.data.examples import Images
from afkd_jax.data.sources import Source
from afkd_jax.errors import UserError

_FILES = (
    ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
    ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
)


def read(path: pathlib.Path, axes: int, opened: IO[bytes] | None = None) -> np.ndarray:
    """Returns a gzip IDX file of bytes as uint8; if it is `opened`, the path is for messages."""
    try:
        with gzip.open(opened or path) as file:
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
            # One byte more than announced, to notice a longer file; piece by piece, so that a
            # header that claims too much costs only the memory of what its file holds.
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


def source(config: Config, argument: str) -> Source:
    """Returns the images of the files in the directory `argument`; classes are named by number.

    Raises:
      UserError: the directory or a file is missing, broken, or does not fit the others.
    """
    folder, splits = paths.local('config.dataset', argument), []
    if not folder.is_dir():
        raise UserError(
            f'config.dataset: there is no directory {folder}; name one that holds the four '
            'gzip IDX files of the MNIST family (Debian: apt-get install dataset-fashion-mnist)'
        )
    for images_name, labels_name in _FILES:
        pixels = read(folder / images_name, 3)
        labels = read(folder / labels_name, 1).astype(np.int32)
        if len(pixels) != len(labels) or len(labels) == 0:
            raise UserError(
                f'config.dataset: {folder / images_name} has {len(pixels)} images but '
                f'{labels_name} has {len(labels)} labels; the numbers must be equal and above 0'
            )
        splits.append(Images(pixels[..., None], labels))
    train, test = splits
    return Source(train, test, tuple(map(str, range(int(train.labels.max()) + 1))))
