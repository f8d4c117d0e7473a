"""Decoding: an image file -> uint8 pixels, whole, cropped for training, or centred for evaluation.

simplejpeg (libjpeg-turbo) decodes JPEG; Pillow decodes other formats and what simplejpeg rejects,
but not damaged JPEG, which it would fill up with grey. Resizing is Pillow's: bilinear and
antialiased.
"""

import contextlib
import dataclasses
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from afkd_jax.config import Data
from afkd_jax.data import randaugment

# Its warnings name no file and change nothing; what is wrong is an error.
warnings.filterwarnings('ignore', module=r'PIL\.')

_JPEG, _PNG = b'\xff\xd8', b'\x89PNG'
# Beginnings of JPEG, PNG, GIF and BMP files, which have their header first, and how much is read of
# them for it. It may be longer: a JPEG may have a colour profile before it.
_HEADER_FIRST, _HEADER_BYTES = (_JPEG, _PNG, b'GIF8', b'BM'), 2**15
_COLOURS = {1: ('GRAY', 'L'), 3: ('RGB', 'RGB')}
_GREY = '1', 'L', 'LA'  # Pillow's modes of images without colours; a palette counts as colours
_SPARE = 2  # as in Pillow's reducing_gap, "almost indistinguishable"
_TRIES = 10  # to find a crop inside the image; the usual number

Stored = np.ndarray | bytes  # an image: uint8 [H, W, C], or an encoded file
Shape = tuple[int, int, int]  # (H, W, C)
Range = tuple[float, ...]  # smallest and largest


class DecodeError(Exception):
    """An image cannot be decoded; the text says why."""


def _with_pillow(
    pixels_HxWxC: np.ndarray, function: Callable[[Image.Image], Image.Image]
) -> np.ndarray:
    """Returns function(image) of uint8 pixels; Pillow has no channel axis for grey images."""
    grey = pixels_HxWxC.shape[2] == 1
    image = function(Image.fromarray(pixels_HxWxC[..., 0] if grey else pixels_HxWxC))
    return np.asarray(image)[..., None] if grey else np.asarray(image)


@dataclasses.dataclass(frozen=True)
class View:
    """The networks' view of a stored image, a square of S = data.image_size; 0: the whole image.

    Source: the usual ImageNet recipe (Szegedy et al., 2015) has S = 224, a training crop of
    (0.08, 1) of the area and (3/4, 4/3) width / height, and 256 before evaluation's centre crop.
    """

    data: Data

    def training(self, image: Stored, channels: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a random crop, resized, then RandAugment: uint8 [S, S, C]; or a DecodeError."""
        seen = self._crop(image, channels, rng) if self.data.image_size else pixels(image, channels)
        number, magnitude = self.data.randaugment_operations, self.data.randaugment_magnitude
        if not number:
            return seen
        return _with_pillow(seen, lambda image: randaugment.vary(image, number, magnitude, rng))

    def _crop(self, image: Stored, channels: int, rng: np.random.Generator) -> np.ndarray:
        height, width, _ = header(image)
        scale, ratio = self.data.crop_scale, self.data.crop_ratio
        left, top, right, bottom = random_crop(height, width, scale, ratio, rng)
        # Decoding a JPEG at n/8 of its size is faster; the resize to S still halves it.
        least = _SPARE * self.data.image_size / min(right - left, bottom - top)
        whole = pixels(image, channels, least)
        y, x = whole.shape[0] / height, whole.shape[1] / width
        return self._resized(whole, (left * x, top * y, right * x, bottom * y))

    def evaluation(self, image: Stored, channels: int) -> np.ndarray:
        """Returns the centre of the image, resized: uint8 [S, S, C]; see training()."""
        whole = pixels(image, channels)
        if not self.data.image_size:
            return whole
        height, width = whole.shape[:2]
        # The central square of the resized image, cut out before it is resized: the same pixels.
        side = self.data.image_size / self.data.eval_resize * min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        return self._resized(whole, (left, top, left + side, top + side))

    def _resized(self, whole: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
        size, bilinear = self.data.image_size, Image.Resampling.BILINEAR
        return _with_pillow(whole, lambda image: image.resize((size, size), bilinear, box=box))


def random_crop(
    height: int, width: int, scale: Range, ratio: Range, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random crop.

    If ten random shapes do not fit into the image: the largest central crop of allowed ratio.
    """
    for _ in range(_TRIES):
        area = height * width * rng.uniform(scale[0], scale[1])
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pixels(image: Stored, channels: int, scale: float = 1.0) -> np.ndarray:
    """Returns an image as uint8 [H, W, C] with C = channels, or raises DecodeError.

    With `scale` below 1 a JPEG may be returned at n/8 of its size, at least this fraction of it.
    """
    if isinstance(image, np.ndarray):
        return image
    fast, slow = _COLOURS[channels]
    if image[:2] == _JPEG:
        least: dict[str, Any] = {}
        if scale <= 7 / 8:
            eighths = math.ceil(8 * scale)
            height, width = (math.ceil(side * eighths / 8) for side in header(image)[:2])
            least = {'min_height': height, 'min_width': width}
        try:
            return simplejpeg.decode_jpeg(image, fast, **least)
        except ValueError as error:
            if _is_damage(str(error), image):
                raise DecodeError(str(error)) from error
    if image.startswith(_PNG):  # of the pixels Pillow compares the checksums only here
        with _opened(image) as file:
            file.verify()
    with _opened(image) as file:
        whole = np.asarray(file.convert(slow))
    return whole if channels > 1 else whole[..., None]


def _is_damage(fault: str, jpeg: bytes) -> bool:
    """Returns whether a fault that libjpeg reports means that a part of the image is lost.

    Bytes that are left over at the end are harmless if they are all equal: then they only fill up.
    """
    if left := re.match(r'Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9', fault):
        filled = rb'(.)\1{%d}\xff\xd9' % (int(left[1]) - 1)
        return not re.search(filled, jpeg, re.DOTALL)
    return fault.startswith(('Corrupt JPEG data', 'Premature end of JPEG'))


def of_shape(image: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns the image if it has this shape, else raises DecodeError."""
    if image.shape != shape:
        raise DecodeError(f'it is {image.shape}, others {shape}')
    return image


@contextlib.contextmanager
def _opened(image: bytes) -> Iterator[Image.Image]:
    """Yields the image in Pillow; a failure is a DecodeError, with the same text in every run."""
    try:
        with Image.open(io.BytesIO(image)) as file:  # reads the header alone
            if file.mode[0] in 'IF':  # Pillow would clip them at 255
                raise DecodeError(f'its pixels are no bytes (mode {file.mode})')
            yield file
    except DecodeError:
        raise
    except Exception as error:  # of a broken file Pillow raises whatever its decoders do
        words = re.sub(r'<_io\.BytesIO object at \w+>', 'it', ' '.join(str(error).split()))
        raise DecodeError(words or type(error).__name__) from error


def header(image: Stored) -> Shape:
    """Returns (height, width, channels), the channels 1 if it is stored as grey, else 3."""
    if isinstance(image, np.ndarray):
        height, width, channels = image.shape
        return height, width, channels
    if image[:2] == _JPEG:
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
            return int(height), int(width), 1 if colours == 'Gray' else 3
    with _opened(image) as file:
        return file.height, file.width, 1 if file.mode in _GREY else 3


def read_header(file: BinaryIO) -> Shape:
    """Returns the header() of an image file; reads only its beginning where that is enough."""
    content = file.read(_HEADER_BYTES)
    if content.startswith(_HEADER_FIRST):
        with contextlib.suppress(DecodeError):
            return header(content)
    return header(content + file.read())
