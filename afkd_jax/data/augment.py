"""Images on the device, and how a batch is gathered, varied and standardised there."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from afkd_jax.data.dataset import Splits
from afkd_jax.devices.mesh import DATA, rolled
from afkd_jax.method.losses import Mixed


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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How training images are varied on the device; each a function of the image's own key.

    Attributes:
      pad: pixels of zeros on each side, before a random crop of the old size; 0: none.
      flip: whether to mirror left and right with probability 1/2.
      jitter: colours, see jittered(); 0: none.
      mixup: alpha, see mixed(); 0: none.
      cutmix: alpha, likewise.
    """

    pad: int = 0
    flip: bool = False
    jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, config: ConfigDict) -> 'Recipe':
        """Returns that of a config."""
        data = config.data
        return cls(data.pad, data.flip, data.color_jitter, data.mixup, data.cutmix)


def unit(pixels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns pixels / 255: in 0 .. 1."""
    return pixels.astype(dtype) / 255


def standardise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Returns (images - mean) / std per channel, of images in 0 .. 1."""
    return (images - mean[None, None, None]) / std[None, None, None]


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


def _grey(image_HxWxC: jax.Array) -> jax.Array:
    """Returns the luma, [H, W, 1], of an RGB image; a grey one as it is (ITU-R BT.601)."""
    if image_HxWxC.shape[-1] == 1:
        return image_HxWxC
    weights = jnp.array([0.299, 0.587, 0.114], image_HxWxC.dtype)
    return (image_HxWxC * weights[None, None]).sum(-1, keepdims=True)


def jittered(key: jax.Array, image_HxWxC: jax.Array, strength: float) -> jax.Array:
    """Returns an image in 0 .. 1 with other brightness, contrast and saturation, in this order.

    Each by a factor that is uniform in 1 - strength .. 1 + strength: times x; away from the mean
    luma; away from the pixel's own luma. Clipped to 0 .. 1 after each.

    Source: the usual colour jitter, whose order is random there and fixed here; no hue.
    """
    factors = jax.random.uniform(
        key, (3,), image_HxWxC.dtype, minval=1 - strength, maxval=1 + strength
    )
    references = (jnp.zeros_like, lambda x: _grey(x).mean(), _grey)
    for factor, reference in zip(factors, references, strict=True):
        start = reference(image_HxWxC)
        image_HxWxC = jnp.clip(start + factor * (image_HxWxC - start), 0, 1)
    return image_HxWxC


def _box(key: jax.Array, shape: tuple[int, int], share: jax.Array) -> jax.Array:
    """Returns bool [H, W, 1]: a box of about 1 - share of the image, clipped to it."""
    cut = jnp.sqrt(1 - share)
    inside = []
    for axis, (size, place) in enumerate(zip(shape, jax.random.uniform(key, (2,)), strict=True)):
        away = jnp.abs(jnp.arange(size) + 0.5 - size * place) < size * cut / 2
        inside.append(jnp.expand_dims(away, 1 - axis))
    return (inside[0] & inside[1])[..., None]


def mixed(
    keys_B: jax.Array, images_BxHxWxC: jax.Array, labels_B: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, Mixed]:
    """Returns the images, each mixed with the one before it in the global batch.

    mixup: share x + (1 - share) other, share ~ Beta(mixup, mixup). cutmix: a box is the other's,
    of area 1 - share before it is clipped, share ~ Beta(cutmix, cutmix); the label's share is that
    of the pixels. With both, each image goes by either with probability 1/2.

    Source: Zhang et al. 2018; Yun et al. 2019. There one share serves the whole batch; here each
    image has its own.
    """
    dtype = images_BxHxWxC.dtype

    def mask(key):
        """Returns how much of each pixel is the image's own: [H, W, 1]."""
        which, first, second, place = jax.random.split(key, 4)
        shape = images_BxHxWxC.shape[1:3]
        ones = jnp.ones((*shape, 1), dtype)
        over_all = mixup and jax.random.beta(first, mixup, mixup, dtype=dtype) * ones
        box = cutmix and ~_box(place, shape, jax.random.beta(second, cutmix, cutmix, dtype=dtype))
        if not cutmix:
            return over_all
        if not mixup:
            return box.astype(dtype)
        return jnp.where(jax.random.bernoulli(which), over_all, box.astype(dtype))

    own = jax.vmap(mask)(keys_B)
    others = rolled(images_BxHxWxC, 1, DATA)
    share_B = own.mean((1, 2, 3))
    return others + own * (images_BxHxWxC - others), Mixed(rolled(labels_B, 1, DATA), share_B)


def training_batch(
    images: Table, index_B: jax.Array, key: jax.Array, recipe: Recipe
) -> tuple[jax.Array, jax.Array, Mixed | None]:
    """Returns (standardised images [B, H, W, C], labels [B], what they are mixed with).

    An image's variation is a function of (key, its index), so it does not depend on the device
    that makes it.

    Args:
      images: all images, or those of the batch.
      index_B: int32 [B], of the batch.
      key: of this step.
      recipe: how.
    """
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
    pixels, labels = images.rows(index_B)
    pixels = jax.vmap(lambda k, p: vary(k, p, recipe.pad, recipe.flip))(keys_B, pixels)
    seen = unit(pixels, images.mean.dtype)

    def keys(number):
        # 0 and 1 may be those that vary() splits off: fold_in and split agree there.
        return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys_B)

    if recipe.jitter:
        seen = jax.vmap(lambda k, x: jittered(k, x, recipe.jitter))(keys(2), seen)
    seen = standardise(seen, images.mean, images.std)
    if not (recipe.mixup or recipe.cutmix):
        return seen, labels, None
    seen, other = mixed(keys(3), seen, labels, recipe.mixup, recipe.cutmix)
    return seen, labels, other


def evaluation_batch(images: Table, index_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (standardised images [B, H, W, C], labels [B]) of these indices, as they are."""
    pixels, labels = images.rows(index_B)
    return standardise(unit(pixels, images.mean.dtype), images.mean, images.std), labels
