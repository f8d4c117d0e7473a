"""Seconds to read the headers of a folder of small JPEG files, and to load all its images.

python -m benchmarks.load_speed [COUNT [SIDE]]

The images are cut out of two photographs, quality 90, and grey, so that the header of every one is
read. Every figure is the median of five interleaved rounds. One JSON line each.
"""

import functools
import os
import pathlib
import sys
import tempfile
import time
from concurrent import futures

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from afkd_jax.config import Config, default_config
from afkd_jax.data import decode
from afkd_jax.data.dataset import dataset as open_dataset
from benchmarks import rounds


def write(root, count, side):
    """Writes `count` images to train on and two to test on."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for number in range(count + 2):
        photo = photos[number % 2]
        top, left = (rng.integers(0, size - side) for size in photo.shape[:2])
        split = 'train' if number < count else 'test'
        path = root / split / str(number % 2) / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = photo[top : top + side, left : left + side]
        Image.fromarray(pixels).convert('L').save(path, quality=90)


def seconds_of(way):
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def main(count, side):
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), count, side)
        paths = [str(path) for path in pathlib.Path(folder).rglob('*.jpg')]
        files = [pathlib.Path(path).read_bytes() for path in paths]
        config = default_config()
        config.dataset = f'folder:{folder}'
        config = Config.of(config)

        def by_pillow(path):
            with Image.open(path) as file:
                return file.size, file.mode

        def header(path):
            with open(path, 'rb') as file:
                return decode.header(file.read())

        def in_threads(function):
            with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda n: list(map(function, paths[n::64])), range(64)))

        ways = {
            'headers, Pillow': lambda: list(map(by_pillow, paths)),
            'headers, Pillow, a thread per core': lambda: in_threads(by_pillow),
            'headers': lambda: list(map(header, paths)),
            'headers, a thread per core': lambda: in_threads(header),
            'open the folder': lambda: open_dataset(config),
            'decode alone, one core': lambda: [decode.pixels(file, 1) for file in files],
            'load': open_dataset(config).load,
        }
        timed = {what: functools.partial(seconds_of, way) for what, way in ways.items()}
        rounds.measure(timed, 2, 'seconds')


if __name__ == '__main__':
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*arguments, *(60_000, 32)[len(arguments) :])
