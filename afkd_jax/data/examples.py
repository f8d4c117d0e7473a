"""What every source of images gives: labelled images of one split, by random access."""

import abc
import dataclasses
import hashlib

import numpy as np
from ml_collections import ConfigDict

from afkd_jax.data import decode
from afkd_jax.errors import UserError


def seen_shape(config: ConfigDict, image_shape: tuple[int | None, ...]) -> tuple[int, int, int]:
    """Returns the shape in which the networks see images of this stored shape."""
    if size := config.data.image_size:
        return size, size, image_shape[2]
    if None in image_shape:
        raise UserError(
            f'config.data.image_size: the images of {config.dataset} have many sizes; give the '
            'one to which they are cropped, e.g. --config.data.image_size=224'
        )
    return image_shape


class Examples(abc.ABC):
    """Labelled images of one split.

    Attributes:
      image_shape: (H, W, C); H and W are None where the images have many sizes.
    """

    image_shape: tuple[int | None, int | None, int]

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> tuple[np.ndarray | bytes, int]:
        """Returns (uint8 [H, W, C], or an encoded file; label)."""

    @abc.abstractmethod
    def read_labels(self) -> np.ndarray:
        """Returns int32 [N]; it may have to read every record."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Returns where an image is stored, for who must look after it."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns what tells these images from others without reading them, as hex."""

    def load(self) -> 'Images':
        """Returns all of them in memory, as they are stored; they must be of one size.

        Raises:
          decode.Broken: an image cannot be decoded, or is of another size.
        """
        pixels = np.empty((len(self), *self.image_shape), np.uint8)
        labels = np.empty(len(self), np.int32)
        for i in range(len(self)):
            image, labels[i] = self[i]
            try:
                one = decode.pixels(image, self.image_shape[2])
                if one.shape != self.image_shape:
                    raise decode.Broken(f'it is {one.shape}, others {self.image_shape}')
            except decode.Broken as error:
                raise decode.Broken(f'{self.name(i)}: {error}') from error
            pixels[i] = one
        return Images(pixels, labels)


@dataclasses.dataclass(frozen=True)
class Images(Examples):
    """Images in memory.

    Attributes:
      pixels: uint8 [N, H, W, C].
      labels: int32 [N] in 0 .. num_classes - 1.
    """

    pixels: np.ndarray
    labels: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.pixels.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index], int(self.labels[index])

    def read_labels(self) -> np.ndarray:
        """Returns the labels."""
        return self.labels

    def name(self, index: int) -> str:
        """Returns its number."""
        return f'image {index}'

    def fingerprint(self) -> str:
        """Returns a hash of them all."""
        digest = hashlib.sha256(repr((self.pixels.shape, self.pixels.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self.pixels))
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()

    def load(self) -> 'Images':
        """Returns itself."""
        return self

    def take(self, index: np.ndarray) -> 'Images':
        """Returns the images of these indices, in this order."""
        return Images(self.pixels[index], self.labels[index])
