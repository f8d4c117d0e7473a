"""The pipeline of streamed images; broken images, and the mean and standard deviation."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from afkd_jax.config import Config
from afkd_jax.data.dataset import Dataset
from afkd_jax.data.images import DeviceImages, histogram, moments
from afkd_jax.data.order import padded_batches
from afkd_jax.data.pipelines.base import EvaluationBatches, Pipeline, TrainingBatches
from afkd_jax.data.stream import Batches, Rows, stream
from afkd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StreamPipeline(Pipeline):
    """Images that are read and decoded when needed; every process computes its devices' rows."""

    dataset: Dataset
    mean: jax.Array  # float32 [C], on the devices, as is std
    std: jax.Array
    log: Callable[[str], None]
    broken: set[int] = dataclasses.field(default_factory=set)  # images that cannot be decoded

    @property
    def mean_std(self) -> tuple[Any, Any]:
        """See Pipeline."""
        return self.mean, self.std

    def _images(self, batches: Batches, rows: Rows) -> DeviceImages:
        _count_broken(self.config, batches, rows, self.broken, self.log)
        put = functools.partial(self.devices.split_rows, size=batches.size)
        pixels, labels = put(rows.pixels), put(rows.labels)
        return DeviceImages(pixels, labels, self.mean, self.std, gathered=True)

    @contextlib.contextmanager
    def training(self, first_step: int) -> Iterator[TrainingBatches]:
        """See Pipeline."""
        config, order, put = self.config, self.order, self.devices.split
        last, size = order.end_of(config.epochs), config.batch_size
        local = self.devices.rows(size)
        batches = Batches(
            self.dataset, order.indices, last, size, local, config.seed, config.data.max_corrupt
        )
        with stream(batches, first_step, config.data.workers) as parts:
            steps = range(first_step, last)
            yield ((self._images(batches, next(parts)), put(order.indices(step))) for step in steps)

    @contextlib.contextmanager
    def evaluation(self, indices: Sequence[int]) -> Iterator[EvaluationBatches]:
        """See Pipeline. The mask leaves out images that cannot be decoded."""
        devices, size = self.devices, self.config.eval_batch_size
        padded, local = padded_batches(indices, size), devices.rows(size)
        batches = _of_list(self.dataset, [index for index, _ in padded], size, local)

        def batch(rows, index, mask):
            decoded = devices.split_rows(mask[local] & (rows.broken < 0), size)
            return self._images(batches, rows), devices.split(index), decoded

        with stream(batches, 0, self.config.data.workers) as parts:
            yield (batch(rows, *rest) for rows, rest in zip(parts, padded, strict=True))


def _of_list(dataset: Dataset, indices: list[np.ndarray], size: int, rows: np.ndarray) -> Batches:
    return Batches(dataset, indices.__getitem__, len(indices), size, rows, None)


def _count_broken(
    config: Config, batches: Batches, rows: Rows, broken: set[int], log: Callable[[str], None]
) -> None:
    """Adds images that cannot be decoded to `broken`, and logs each once; too many: UserError."""
    for index in rows.broken[rows.broken >= 0].tolist():
        if index in broken:
            continue
        broken.add(index)
        reason, most = batches.reason(index), config.data.max_corrupt
        if len(broken) > most:
            raise UserError(
                f'config.data.max_corrupt: {len(broken)} images cannot be decoded, {most} may be '
                f'skipped; the last is {reason}; repair or remove it, or allow more'
            )
        log(f'warning: an image is skipped ({len(broken)} of at most {most}): {reason}')


def check_splits(dataset: Dataset) -> None:
    """Rejects a split without any image that can be decoded, however many may be skipped."""
    batches = _of_list(dataset, [], 1, np.arange(1))
    for split in ('train', *dataset.info.held_out()):
        indices = dataset.info.indices(split)
        if all(map(batches.fault, indices)):
            raise UserError(
                f'config.dataset: none of the {len(indices)} images of {split} can be decoded; the '
                f'first is {batches.reason(indices[0])}; repair them'
            )


def mean_std_of(
    config: Config, dataset: Dataset, log: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and std, float32 [C], of the training images, after reading all of them."""
    log('reading the training images once, for their mean and standard deviation')
    size = min(256, dataset.info.train)
    padded = padded_batches(dataset.info.indices('train'), size)
    batches = _of_list(dataset, [index for index, _ in padded], size, np.arange(size))
    counts, broken = np.zeros((dataset.info.image_shape[-1], 256), int), set()
    with stream(batches, 0, config.data.workers) as parts:
        for rows, (_, mask) in zip(parts, padded, strict=True):
            _count_broken(config, batches, rows, broken, lambda message: None)
            counts += histogram(rows.pixels[mask & (rows.broken < 0)])
    return moments(counts)
