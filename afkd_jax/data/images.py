"""Images as arrays on the devices, and the mean and standard deviation of their channels."""

from typing import Any

import flax.struct
import jax
import numpy as np

from afkd_jax.data.examples import Images


class DeviceImages(flax.struct.PyTreeNode):
    """Images and their normalisation: a pytree."""

    pixels: jax.Array  # uint8 [N, H, W, C]; training, validation and test images, in this order
    labels: jax.Array  # int32 [N]
    mean: jax.Array  # float32 [C], of training pixels scaled to 0 .. 1, as is std
    std: jax.Array
    # Static: whether pixels and labels are those of one batch instead of the whole run.
    gathered: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def on_host(
        cls, images: Images, train: int, mean_std: tuple[np.ndarray, np.ndarray] | None = None
    ) -> 'DeviceImages':
        """Returns NumPy arrays; mean and std default to those of the first `train` images."""
        mean, std = mean_std or moments(histogram(images.pixels[:train]))
        arrays: Any = images.pixels, images.labels, mean, std
        return cls(*arrays)

    def rows(self, index_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (pixels, labels) of a batch."""
        if self.gathered:
            return self.pixels, self.labels
        return self.pixels[index_B], self.labels[index_B]


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Returns the number of occurrences of each value, per channel: int [C, 256]."""
    channels = range(pixels.shape[-1])
    return np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in channels])


def moments(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, std), float32 [C], of pixels scaled to 0 .. 1, from their histogram.

    Counts are exact: no rounding, whatever the order, and no float copy of the images.
    """
    frequency, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = frequency @ values
    # A constant channel becomes 0 instead of being divided by 0.
    std = np.maximum(np.sqrt(np.maximum(frequency @ values**2 - mean**2, 0)), 1 / 255)
    return mean.astype(np.float32), std.astype(np.float32)
