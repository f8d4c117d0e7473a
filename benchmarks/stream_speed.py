"""Images per second of decoding, of decoding and cropping, and of the whole host pipeline.

python -m benchmarks.stream_speed [SECONDS]

The images are cut out of two photographs at 500 x 375, quality 95, as those of ImageNet mostly
are; they become 224 x 224. Every figure is the median of five interleaved
rounds. One JSON line each.
"""

import io
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from concurrent import futures

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from afkd_jax.config import Config
from afkd_jax.data import decode, stream
from afkd_jax.data.dataset import dataset as open_dataset
from afkd_jax.data.order import Order
from benchmarks import rounds
from configs import imagenet

COUNT, BATCH = 400, 64


def write(root):
    """Writes COUNT images for training and a few to test on."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for number in range(COUNT + 20):
        photo = Image.fromarray(photos[number % 2])
        left, top = rng.uniform(0, 100), rng.uniform(0, 40)
        image = photo.resize(
            (500, 375), Image.Resampling.BICUBIC, (left, top, left + 500, top + 375)
        )
        split = 'train' if number < COUNT else 'val'
        path = root / split / str(number % 4) / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95)


def rate(images, seconds):
    """Returns images per second of next(images), which returns how many images it has processed."""
    next(images)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        count += next(images)
    return count / (time.perf_counter() - begin)


def by_pillow(files):
    number = 0
    while True:
        with Image.open(io.BytesIO(files[number % len(files)])) as file:
            np.asarray(file.convert('RGB'))
        yield 1
        number += 1


def decoded(files):
    number = 0
    while True:
        decode.pixels(files[number % len(files)], 3)
        yield 1
        number += 1


def cropped(files, view):
    number = 0
    while True:
        view.training(files[number % len(files)], 3, np.random.default_rng((0, number)))
        yield 1
        number += 1


def on_every_core(files, view):
    """The same in one thread per core: decoding and resizing release the GIL."""

    def crop(number):
        view.training(files[number % len(files)], 3, np.random.default_rng((0, number)))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        number = 0
        while True:
            list(pool.map(crop, range(number, number + BATCH)))
            yield BATCH
            number += BATCH


def piped(dataset, workers):
    order = Order(0, dataset.info.train, BATCH)
    batches = stream.Batches(dataset, order.indices, 10**6, BATCH, np.arange(BATCH), 0)
    with stream.stream(batches, 0, workers) as parts:
        for rows in parts:
            yield len(rows.labels)


def main(seconds):
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder))
        config = imagenet.get_config()
        config.dataset, config.batch_size = f'folder:{folder}', BATCH
        dataset = open_dataset(Config.of(config))
        files = [dataset[index][0] for index in range(COUNT)]
        print(json.dumps({'mean_bytes': statistics.mean(map(len, files)), 'cores': os.cpu_count()}))
        ways = {
            'Pillow decodes': lambda: by_pillow(files),
            'decode': lambda: decoded(files),
            'decode, crop, resize': lambda: cropped(files, dataset.view),
            'decode, crop, resize on every core': lambda: on_every_core(files, dataset.view),
            'pipeline, threads': lambda: piped(dataset, 0),
            'pipeline, 1 process': lambda: piped(dataset, 1),
            'pipeline, 2 processes': lambda: piped(dataset, 2),
        }
        rates = {what: lambda way=way: rate(way(), seconds) for what, way in ways.items()}
        rounds.measure(rates, 1, 'images_per_s')


if __name__ == '__main__':
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0)
