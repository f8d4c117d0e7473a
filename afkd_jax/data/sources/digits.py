"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; 20 % are the test split."""

import numpy as np
from sklearn import datasets

from afkd_jax.config import Config
from afkd_jax.data.dataset import stratified_split
from afkd_jax.data.examples import Images
from afkd_jax.data.sources import Source


def source(config: Config, argument: str) -> Source:
    """Returns the digits; their values 0 .. 16 become 0 .. 240, which is exact in uint8."""
    digits = datasets.load_digits()
    pixels = (digits.images * 15).astype(np.uint8)[..., None]  # pyright: ignore
    images = Images(pixels, digits.target.astype(np.int32))  # pyright: ignore
    train, test = stratified_split(images, 0.2)
    return Source(images.take(train), images.take(test), tuple('0123456789'))
