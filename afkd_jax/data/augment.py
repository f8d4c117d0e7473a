"""Augmentation on the device: how a batch is gathered, augmented and standardised."""

import flax.struct
import jax
import jax.numpy as jnp

from afkd_jax.config import Data
from afkd_jax.data.images import DeviceImages
from afkd_jax.devices.spmd import DATA, roll_across_devices


class Mixed(flax.struct.PyTreeNode):
    """The second labels of mixed images."""

    labels: jax.Array  # int32 [B], of the images mixed in
    weight: jax.Array  # float [B] in [0, 1], of the images' first labels


def unit(pixels: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns pixels / 255, in 0 .. 1."""
    return pixels.astype(dtype) / 255


def standardise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Returns (images - mean) / std per channel, of images in 0 .. 1."""
    return (images - mean[None, None, None]) / std[None, None, None]


def crop_and_flip(key: jax.Array, pixels_HxWxC: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Returns an image after a random crop of its zero-padded self and a random horizontal flip.

    Offsets are uniform in 0 .. 2 pad; the flip has probability 1/2.

    Source: the usual CIFAR recipe (pad 4).
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
    """Returns the luma, [H, W, 1], of an RGB image (ITU-R BT.601); a grey image unchanged."""
    if image_HxWxC.shape[-1] == 1:
        return image_HxWxC
    weights = jnp.array([0.299, 0.587, 0.114], image_HxWxC.dtype)
    return (image_HxWxC * weights[None, None]).sum(-1, keepdims=True)


def color_jittered(key: jax.Array, image_HxWxC: jax.Array, strength: float) -> jax.Array:
    """Returns an image in 0 .. 1 with changed brightness, contrast and saturation, in this order.

    Each factor is uniform in 1 - strength .. 1 + strength and scales the difference from 0, from
    the mean luma, and from the pixel's own luma. Values are clipped to 0 .. 1 after each.

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


def _box(key: jax.Array, shape: tuple[int, int], weight: jax.Array) -> jax.Array:
    """Returns bool [H, W, 1]: a box of area about 1 - weight of the image, clipped to it."""
    cut = jnp.sqrt(1 - weight)
    inside = []
    for axis, (size, centre) in enumerate(zip(shape, jax.random.uniform(key, (2,)), strict=True)):
        near = jnp.abs(jnp.arange(size) + 0.5 - size * centre) < size * cut / 2
        inside.append(jnp.expand_dims(near, 1 - axis))
    return (inside[0] & inside[1])[..., None]


def mixed(
    keys_B: jax.Array, images_BxHxWxC: jax.Array, labels_B: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, Mixed]:
    """Returns the images, each mixed with the preceding one of the global batch.

    mixup: weight x + (1 - weight) other, weight ~ Beta(mixup, mixup). cutmix: a box, of area
    1 - weight before it is clipped, comes from the other, weight ~ Beta(cutmix, cutmix); the
    label's weight is the fraction of pixels. With both, each image gets either with probability
    1/2.

    Source: Zhang et al. 2018; Yun et al. 2019. There one weight serves the whole batch; here each
    image has its own.
    """
    dtype = images_BxHxWxC.dtype

    def mask(key) -> jax.Array:  # the weight of each of the image's own pixels: [H, W, 1]
        which, first, second, centre = jax.random.split(key, 4)
        height, width = images_BxHxWxC.shape[1:3]
        ones = jnp.ones((height, width, 1), dtype)
        over_all = jax.random.beta(first, mixup, mixup, dtype=dtype) * ones if mixup else ones
        if not cutmix:
            return over_all
        weight = jax.random.beta(second, cutmix, cutmix, dtype=dtype)
        outside = (~_box(centre, (height, width), weight)).astype(dtype)
        return jnp.where(jax.random.bernoulli(which), over_all, outside) if mixup else outside

    own = jax.vmap(mask)(keys_B)
    others = roll_across_devices(images_BxHxWxC, 1, DATA)
    second = Mixed(roll_across_devices(labels_B, 1, DATA), own.mean((1, 2, 3)))
    return others + own * (images_BxHxWxC - others), second


def training_batch(
    images: DeviceImages,
    index_B: jax.Array,
    key: jax.Array,
    data: Data,
    network: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array, Mixed | None]:
    """Returns (standardised images [B, H, W, C], labels [B], second labels of mixed images).

    The augmentation of an image is a function of (key of the step, its index), so it does not
    depend on the device that computes it. Given a network, counted from 0, the crop, flip and
    colours are also a function of it; what is mixed with what, and how, is not.
    """
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
    pixels, labels = images.rows(index_B)

    def keys(number, keys_B=keys_B):
        # 0 and 1 may be the keys that crop_and_flip() splits off: fold_in and split agree there.
        return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys_B)

    view_B = keys_B if network is None else keys(4 + network)
    pixels = jax.vmap(lambda k, p: crop_and_flip(k, p, data.pad, data.flip))(view_B, pixels)
    inputs = unit(pixels, images.mean.dtype)
    if data.color_jitter:
        jitter_B = keys(2, view_B)
        inputs = jax.vmap(lambda k, x: color_jittered(k, x, data.color_jitter))(jitter_B, inputs)
    inputs = standardise(inputs, images.mean, images.std)
    if not (data.mixup or data.cutmix):
        return inputs, labels, None
    inputs, second = mixed(keys(3), inputs, labels, data.mixup, data.cutmix)
    return inputs, labels, second


def evaluation_batch(images: DeviceImages, index_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (standardised images [B, H, W, C], labels [B]), without augmentation."""
    pixels, labels = images.rows(index_B)
    return standardise(unit(pixels, images.mean.dtype), images.mean, images.std), labels
