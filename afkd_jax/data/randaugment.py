"""RandAugment, on the host, with Pillow.

Source: Cubuk et al. 2020; the fourteen operations and, for a magnitude of 0 .. 30, the ranges that
common implementations use. Geometric operations fill with black.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30
_BILINEAR = Image.Resampling.BILINEAR

_Operation = Callable[[Image.Image, float, float], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=_BILINEAR)


def _enhance(kind: type) -> _Operation:
    """Returns the operation of a Pillow enhancer with factor 1 +- 0.9 strength."""
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


# Functions of (image, strength in 0 .. 1, sign -1 or 1).
OPERATIONS: dict[str, _Operation] = {
    'identity': lambda image, strength, sign: image,
    'autocontrast': lambda image, strength, sign: ImageOps.autocontrast(image),
    'equalize': lambda image, strength, sign: ImageOps.equalize(image),
    'rotate': lambda image, strength, sign: image.rotate(sign * 30 * strength, resample=_BILINEAR),
    'solarize': lambda image, strength, sign: ImageOps.solarize(image, round(256 * (1 - strength))),
    'posterize': lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    'color': _enhance(ImageEnhance.Color),
    'contrast': _enhance(ImageEnhance.Contrast),
    'brightness': _enhance(ImageEnhance.Brightness),
    'sharpness': _enhance(ImageEnhance.Sharpness),
    'shear_x': lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    'shear_y': lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    'translate_x': lambda image, strength, sign: _affine(
        image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0
    ),
    'translate_y': lambda image, strength, sign: _affine(
        image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height
    ),
}


def vary(
    image: Image.Image, operations: int, magnitude: float, rng: np.random.Generator
) -> Image.Image:
    """Returns the image after that many random operations; magnitude in 0 .. MAX_MAGNITUDE."""
    for name in rng.choice(list(OPERATIONS), operations):
        image = OPERATIONS[name](image, magnitude / MAX_MAGNITUDE, rng.choice((-1, 1)))
    return image
