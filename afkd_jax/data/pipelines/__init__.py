"""Pipelines: how batches come to the devices.

'device': all images lie on every device, and the step gathers a batch. 'host': they lie in the
host's memory, which gathers a batch and sends it. 'stream': they are read from disk and decoded
ahead of the step. All three yield the same batches in the same order.
"""

import math
from collections.abc import Callable

import numpy as np

from afkd_jax.config import Config
from afkd_jax.data.dataset import Dataset, Info
from afkd_jax.data.images import DeviceImages
from afkd_jax.data.pipelines.base import InMemory, Pipeline
from afkd_jax.data.pipelines.stream import StreamPipeline, check_splits, mean_std_of
from afkd_jax.data.stream import check_shared_memory
from afkd_jax.devices import arrays, memory
from afkd_jax.devices.mesh import Devices

__all__ = ['Pipeline', 'create', 'in_memory', 'shapes_only']

_MOST = 0.25  # of a device's memory, for images under config.data.placement = 'auto'


def _placement(config: Config, info: Info, devices: Devices) -> str:
    """Returns 'device', 'host' or 'stream'; see config.data.placement."""
    if config.data.placement != 'auto':
        return config.data.placement
    # A local device: others do not report their memory. A plan's devices may all be absent.
    device = next(iter(devices.mesh.local_devices), devices.first)
    available = memory.device_bytes(device)
    if available is not None and device.platform == 'cpu':
        available //= devices.mesh.size  # they share it
    size = info.examples * math.prod(info.image_shape)
    large = available is not None and size > _MOST * available
    decoded_anew = config.data.image_size or config.data.randaugment_operations
    return 'stream' if decoded_anew or large else 'device'


def shapes_only(config: Config, info: Info, devices: Devices) -> Pipeline:
    """Returns a pipeline that knows its shapes and shardings but has no images, for planning."""
    return Pipeline(config, info, devices, '', _placement(config, info, devices))


def in_memory(
    config: Config, info: Info, devices: Devices, images: DeviceImages, fingerprint: str
) -> InMemory:
    """Returns a pipeline of these images (NumPy arrays); 'host' where they would be streamed."""
    placement = _placement(config, info, devices)
    if placement == 'device':
        images = devices.replicate(images)
    else:
        mean, std = devices.replicate((images.mean, images.std))
        placement, images = 'host', images.replace(mean=mean, std=std)
    return InMemory(config, info, devices, fingerprint, placement, images)


def without_images(classes: tuple[str, ...], labels: np.ndarray) -> str | None:
    """Returns a warning about classes that are not among the labels of the training images."""
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(absent):
        return None
    names = ', '.join(f'{n} ("{classes[n]}")' for n in absent[:3]) + ', ...' * (len(absent) > 3)
    return (
        f'warning: {len(absent)} of {len(classes)} classes have no training image: {names}; the '
        'networks have outputs for them all the same. Where labels have a hole, as those that '
        'count from 1, number them anew in a source of your own (docs/extending.md)'
    )


def create(
    config: Config, dataset: Dataset, devices: Devices, log: Callable[[str], None]
) -> Pipeline:
    """Returns the pipeline of a config; unless they are streamed, all images are read now.

    Raises:
      UserError: an image, or of streamed images a whole split, cannot be decoded; or workers have
        too little shared memory.
    """
    info, mean_std = dataset.info, None
    if config.data.mean:
        mean_std = np.array(config.data.mean, np.float32), np.array(config.data.std, np.float32)
    if _placement(config, info, devices) == 'stream':
        rows = sum(len(devices.rows(n)) for n in (config.batch_size, config.eval_batch_size))
        check_shared_memory(config.data.workers, rows * math.prod(info.image_shape))
        check_splits(dataset)
        mean, std = devices.replicate(mean_std or mean_std_of(config, dataset, log))
        fingerprint = f'stream {dataset.fingerprint()}'  # in memory it is that of the images
        return StreamPipeline(config, info, devices, fingerprint, 'stream', dataset, mean, std, log)
    loaded = dataset.load()
    if line := without_images(info.classes, loaded.labels[: info.train]):
        log(line)
    images = DeviceImages.on_host(loaded, info.train, mean_std)
    fingerprint = arrays.fingerprint((images.pixels, images.labels))
    return in_memory(config, info, devices, images, fingerprint)
