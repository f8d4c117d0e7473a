"""The interface of pipelines, and the one with all images in memory."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from afkd_jax.config import Config
from afkd_jax.data.dataset import Info
from afkd_jax.data.images import DeviceImages
from afkd_jax.data.order import Order, padded_batches
from afkd_jax.devices.mesh import BATCH_SHARDED, REPLICATED, Devices

TrainingBatches = Iterator[tuple[DeviceImages, jax.Array]]
EvaluationBatches = Iterator[tuple[DeviceImages, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The batches of a run. A plain Pipeline has their shapes and shardings only, for planning.

    A batch is a DeviceImages and the indices of its images, int32 [B]. With them the step gathers
    the images, if they are not gathered yet, and derives the randomness of each.
    """

    config: Config
    info: Info
    devices: Devices
    fingerprint: str  # of the images
    placement: str  # 'device', 'host' or 'stream'; only for messages outside of this package

    @property
    def order(self) -> Order:
        """The order of the training images."""
        return Order(self.config.seed, self.info.train, self.config.batch_size)

    @property
    def images_spec(self) -> Any:
        """How a DeviceImages is sharded: a tree of PartitionSpec, or one for all its arrays."""
        if self.placement == 'device':
            return REPLICATED
        specs: Any = BATCH_SHARDED, BATCH_SHARDED, REPLICATED, REPLICATED
        return DeviceImages(*specs, gathered=True)

    def abstract_batch(self, size: int) -> tuple[DeviceImages, jax.Array]:
        """Returns shapes, dtypes and shardings of (images, index) of a batch of this size."""
        whole, struct = self.placement == 'device', jax.ShapeDtypeStruct
        count, shape = self.info.examples if whole else size, self.info.image_shape
        mean = struct(shape[-1:], np.float32)
        arrays: Any = struct((count, *shape), np.uint8), struct((count,), np.int32), mean, mean
        images, index = DeviceImages(*arrays, gathered=not whole), struct((size,), np.int32)
        return self.devices.abstract((images, index), (self.images_spec, BATCH_SHARDED))

    @property
    def mean_std(self) -> tuple[Any, Any]:
        """The mean and standard deviation by which images are standardised: float32 [C] each."""
        raise NotImplementedError

    def training(self, first_step: int) -> contextlib.AbstractContextManager[TrainingBatches]:
        """Opens an iterator of (images, index) from this step, counted from 0, to the last."""
        raise NotImplementedError

    def evaluation(
        self, indices: Sequence[int]
    ) -> contextlib.AbstractContextManager[EvaluationBatches]:
        """Opens an iterator of (images, index, mask); see order.padded_batches."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class InMemory(Pipeline):
    """All images of a run: replicated ('device'), or NumPy pixels and labels ('host')."""

    images: DeviceImages

    @property
    def mean_std(self) -> tuple[Any, Any]:
        """See Pipeline."""
        return self.images.mean, self.images.std

    def batch(self, index: np.ndarray) -> tuple[DeviceImages, jax.Array]:
        """Returns (images, index) of a batch on the devices."""
        put, images = self.devices.split, self.images
        if self.placement == 'host':
            # Each of several processes gathers whole batches, which takes less than the transfer.
            rows: Any = images.pixels[index], images.labels[index]  # NumPy arrays
            pixels, labels = map(put, rows)
            images = images.replace(pixels=pixels, labels=labels, gathered=True)
        return images, put(index)

    @contextlib.contextmanager
    def training(self, first_step: int) -> Iterator[TrainingBatches]:
        """See Pipeline."""
        last = self.order.end_of(self.config.epochs)
        yield (self.batch(self.order.indices(step)) for step in range(first_step, last))

    @contextlib.contextmanager
    def evaluation(self, indices: Sequence[int]) -> Iterator[EvaluationBatches]:
        """See Pipeline."""
        put, padded = self.devices.split, padded_batches(indices, self.config.eval_batch_size)
        yield ((*self.batch(index), put(mask)) for index, mask in padded)
