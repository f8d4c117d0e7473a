"""An encoded image -> uint8 pixels: whole, a random crop to train on, or the centre to evaluate.

JPEG is decoded by libjpeg-turbo (simplejpeg), what that refuses and other formats by Pillow.
Resizing is Pillow's: bilinear, and antialiased, as its support grows with the reduction.
"""

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

from afkd_jax.data import randaugment

_JPEG = b'\xff\xd8'
_COLOURS = {1: ('GRAY', 'L'), 3: ('RGB', 'RGB')}
_SPARE = 2  # as in Pillow's reducing_gap, "almost indistinguishable"
_TRIES = 10  # to find a crop inside the image; the usual number


class Broken(Exception):
    """The bytes are no whole image; the text says why."""


@dataclasses.dataclass(frozen=True)
class View:
    """What of a stored image the networks see.

    Attributes:
      size: side S of the square that it becomes; 0: the image as it is stored.
      scale: range of a training crop's share of the image's area, uniform.
      ratio: range of its width by its height, uniform in the logarithm.
      resize: the shorter side, of which evaluation takes the central S x S.
      operations: of RandAugment, after the crop; 0: none.
      magnitude: of those.

    Source: the usual ImageNet recipe (Szegedy et al., 2015): 224, (0.08, 1), (3/4, 4/3), 256.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    resize: int
    operations: int = 0
    magnitude: float = 0

    def training(
        self, image: np.ndarray | bytes, channels: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns a random crop, resized and varied: uint8 [S, S, C]; the whole if `size` is 0.

        Args:
          image: uint8 [H, W, C], or an encoded file.
          channels: C, 1 or 3.
          rng: of this image in this step.

        Raises:
          Broken: it cannot be decoded.
        """
        seen = self._crop(image, channels, rng) if self.size else pixels(image, channels)
        if self.operations:
            seen = randaugment.vary(seen, self.operations, self.magnitude, rng)
        return seen

    def _crop(
        self, image: np.ndarray | bytes, channels: int, rng: np.random.Generator
    ) -> np.ndarray:
        height, width = _sides(image)
        left, top, right, bottom = random_crop(height, width, self.scale, self.ratio, rng)
        # A JPEG can be decoded at n/8 of its size for less; the resize to S still halves it.
        whole = pixels(image, channels, _SPARE * self.size / min(right - left, bottom - top))
        y, x = whole.shape[0] / height, whole.shape[1] / width
        return _resized(whole, self.size, (left * x, top * y, right * x, bottom * y))

    def evaluation(self, image: np.ndarray | bytes, channels: int) -> np.ndarray:
        """Returns the centre of the image, resized: uint8 [S, S, C]; see training()."""
        whole = pixels(image, channels)
        if not self.size:
            return whole
        height, width = whole.shape[:2]
        # The central square of the resized image, cut out before it is resized: the same pixels.
        side = self.size / self.resize * min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return _resized(whole, self.size, (left, top, left + side, top + side))


def random_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random crop.

    After ten shapes that do not fit into the image: the largest central one of allowed ratio.
    """
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pixels(image: np.ndarray | bytes, channels: int, scale: float = 1.0) -> np.ndarray:
    """Returns an image as uint8 [H, W, C].

    Args:
      image: pixels, which are returned, or an encoded file.
      channels: C, 1 or 3.
      scale: below 1, a JPEG may be returned at n/8 of its size, at least this share of it.

    Raises:
      Broken: it cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        return image
    fast, slow = _COLOURS[channels]
    if image[:2] == _JPEG:
        least = {}
        if scale <= 7 / 8:
            height, width = _sides(image)
            eighths = math.ceil(8 * scale)
            least = {
                'min_height': math.ceil(height * eighths / 8),
                'min_width': math.ceil(width * eighths / 8),
            }
        with contextlib.suppress(ValueError):  # there are bytes that Pillow forgives
            return simplejpeg.decode_jpeg(image, fast, **least)
    with _opened(image) as file:
        if file.mode[0] in 'IF':  # Pillow would cut them off at 255
            raise Broken(f'its pixels are no bytes (mode {file.mode})')
        whole = np.asarray(file.convert(slow))
    return whole if channels > 1 else whole[..., None]


@contextlib.contextmanager
def _opened(image: bytes) -> Iterator[Image.Image]:
    """Gives a file to Pillow; what goes wrong with it is Broken, in the same words in every run."""
    try:
        with Image.open(io.BytesIO(image)) as file:  # reads the header alone
            yield file
    except Broken:
        raise
    except Exception as error:  # of a broken file Pillow raises whatever its decoders do
        words = re.sub(r'<_io\.BytesIO object at \w+>', 'it', ' '.join(str(error).split()))
        raise Broken(words or type(error).__name__) from error


def _sides(image: np.ndarray | bytes) -> tuple[int, int]:
    """Returns (height, width)."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    if image[:2] == _JPEG:
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg_header(image)[:2]
    with _opened(image) as file:
        return file.size[::-1]


def _resized(whole: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Returns a box of an image as a square."""
    grey = whole.shape[2] == 1
    image = Image.fromarray(whole[..., 0] if grey else whole)
    out = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return out[..., None] if grey else out
