"""Images on the device, and how a batch is gathered, varied and standardised there."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from afkd_jax.data.sources import Splits


@flax.struct.dataclass
class Table:
    """Images, with what standardises them.

    Attributes:
      pixels: uint8 [N, H, W, C]; training, validation and test images, in this order.
      labels: int32 [N].
      mean: float32 [C], per channel, of the training images in 0 .. 1.
      std: float32 [C], likewise.
      gathered: static; whether pixels and labels are those of one batch, and not all of the run.
    """

    pixels: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array
    gathered: bool = flax.struct.field(pytree_node=False, default=False)

    def rows(self, index_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (pixels, labels) of a batch of these indices."""
        if self.gathered:
            return self.pixels, self.labels
        return self.pixels[index_B], self.labels[index_B]


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Returns how often each value occurs, per channel: int [C, 256]."""
    channels = range(pixels.shape[-1])
    return np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in channels])


def moments(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, std), float32 [C], of pixels in 0 .. 1 of this histogram.

    Counts are exact: no rounding, whatever the order, and no float copy of the set.
    """
    share, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    # A constant channel is left at 0 instead of being divided by 0.
    std = np.maximum(np.sqrt(np.maximum(share @ values**2 - mean**2, 0)), 1 / 255)
    return mean.astype(np.float32), std.astype(np.float32)


def table(splits: Splits, standard: tuple[np.ndarray, np.ndarray] | None = None) -> Table:
    """Returns the images of a run, still on the host; Info.places() tells which is where.

    Args:
      splits: the images.
      standard: mean and std; None: those of the training images.
    """
    parts = (splits.train, splits.validation, splits.test)
    pixels = np.concatenate([part.pixels for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Table(pixels, labels, *(standard or moments(histogram(splits.train.pixels))))


def standardise(pixels: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Returns (pixels / 255 - mean) / std per channel, in the dtype of `mean`."""
    return (pixels.astype(mean.dtype) / 255 - mean[None, None, None]) / std[None, None, None]


def vary(key: jax.Array, pixels_HxWxC: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Returns one image, randomly cropped out of its zero-padded self and perhaps mirrored.

    Args:
      key: of this image in this step.
      pixels_HxWxC: uint8.
      pad: pixels on each side; offsets are uniform in 0 .. 2 pad; 0 leaves the image as it is.
      flip: mirror left and right with probability 1/2.

    Source: the neighbours' CIFAR recipe (pad 4, random crop, horizontal flip).
    """
    crop_key, flip_key = jax.random.split(key)
    shape = pixels_HxWxC.shape
    if pad:
        padded = jnp.pad(pixels_HxWxC, ((pad, pad), (pad, pad), (0, 0)))
        row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        pixels_HxWxC = jax.lax.dynamic_slice(padded, (row, column, 0), shape)
    if flip:
        mirrored = pixels_HxWxC[:, ::-1]
        pixels_HxWxC = jnp.where(jax.random.bernoulli(flip_key), mirrored, pixels_HxWxC)
    return pixels_HxWxC


def training_batch(
    images: Table, index_B: jax.Array, key: jax.Array, pad: int, flip: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns (standardised images [B, H, W, C], labels [B]) of these indices, varied.

    An image's variation is a function of (key, its index), so it does not depend on the device
    that makes it.

    Args:
      images: all images, or those of the batch.
      index_B: int32 [B], of the batch.
      key: of this step.
      pad: see vary().
      flip: see vary().
    """
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
    pixels, labels = images.rows(index_B)
    pixels = jax.vmap(lambda k, p: vary(k, p, pad, flip))(keys_B, pixels)
    return standardise(pixels, images.mean, images.std), labels


def evaluation_batch(images: Table, index_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (standardised images [B, H, W, C], labels [B]) of these indices, as they are."""
    pixels, labels = images.rows(index_B)
    return standardise(pixels, images.mean, images.std), labels
