"""Examples: the labelled images of one split on the host, by random access."""

import abc
import collections
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np

from afkd_jax.config import Config
from afkd_jax.data import decode
from afkd_jax.errors import UserError

_MOST_THREADS = 16
_CHUNK = 64  # images that a thread decodes at a time

Shape = tuple[int | None, int | None, int]  # (H, W, C); H, W are None where sizes differ


def input_shape(config: Config, image_shape: Shape) -> tuple[int, int, int]:
    """Returns the shape of the networks' input for images of this stored shape."""
    height, width, channels = image_shape
    if size := config.data.image_size:
        return size, size, channels
    if height is None or width is None:
        raise UserError(
            f'config.data.image_size: the images of {config.dataset} have many sizes; give the '
            'one to which they are cropped, e.g. --config.data.image_size=224'
        )
    return height, width, channels


def digest(description: Any, *arrays: np.ndarray) -> str:
    """Returns a SHA-256 of the description's repr and the arrays' bytes, as hex."""
    result = hashlib.sha256(repr(description).encode())
    for array in arrays:
        result.update(np.ascontiguousarray(array).view(np.uint8).data)
    return result.hexdigest()


class Examples(abc.ABC):
    """Labelled images of one split."""

    image_shape: Shape

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[decode.Stored, int]:
        """Returns (image, label); DecodeError: it cannot be read."""

    @abc.abstractmethod
    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        """Returns int32 [n], of these images; may read the record of each."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns where an image is stored, for messages."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns a hash, as hex, that differs for other images; need not read the images."""

    def load(self, indices: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Copies these images into pixels uint8 [n, H, W, C], and their labels into int32 [n].

        This thread reads the images, in the order in which they are stored; others decode them,
        because simplejpeg and Pillow release Python's lock.

        Raises:
          DecodeError: an image cannot be decoded, or differs in size.
        """
        shape = pixels.shape[1:]

        @contextlib.contextmanager
        def named(row: int) -> Iterator[None]:
            try:
                yield
            except decode.DecodeError as error:
                raise decode.DecodeError(f'{self.name(int(indices[row]))}: {error}') from error

        def decode_all(rows: list[int], images: list[decode.Stored]) -> None:
            for row, image in zip(rows, images, strict=True):
                with named(row):
                    pixels[row] = decode.of_shape(decode.pixels(image, shape[2]), shape)

        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        by_place, waiting = np.argsort(indices), collections.deque()
        with futures.ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(by_place), _CHUNK):
                rows = by_place[start : start + _CHUNK].tolist()
                images = []
                for row in rows:
                    with named(row):
                        image, labels[row] = self[int(indices[row])]
                    images.append(image)
                waiting.append(pool.submit(decode_all, rows, images))
                if len(waiting) > 2 * threads:  # so that few encoded images are in memory
                    waiting.popleft().result()
            for job in waiting:
                job.result()


@dataclasses.dataclass(frozen=True)
class Images(Examples):
    """Images in memory."""

    pixels: np.ndarray  # uint8 [N, H, W, C], C = 1 or 3
    labels: np.ndarray  # int32 [N] in 0 .. num_classes - 1

    @property
    def image_shape(self) -> tuple[int, int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(H, W, C)."""
        return self.pixels.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index], int(self.labels[index])

    def read_labels(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels of these images."""
        return self.labels[indices]

    def name(self, index: int) -> str:
        """Returns its number."""
        return f'image {index}'

    def fingerprint(self) -> str:
        """Returns a hash of all pixels and labels."""
        return digest((self.pixels.shape, self.pixels.dtype.str), self.pixels, self.labels)

    def load(self, indices: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> None:
        """See Examples."""
        pixels[:], labels[:] = self.pixels[indices], self.labels[indices]

    def take(self, index: np.ndarray) -> 'Images':
        """Returns the images of these indices, in this order."""
        return Images(self.pixels[index], self.labels[index])
