"""How batches come to the devices: gathered there, gathered on the host, or streamed from disk.

All three give the step the same batches in the same order. A batch is a Table and the places of
its images, by which the step gathers what is not gathered yet and makes the randomness of each.
"""

import abc
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from afkd_jax.data import augment, stream
from afkd_jax.data import dataset as sources
from afkd_jax.data import order as batches
from afkd_jax.devices import mesh as parallel
from afkd_jax.errors import UserError
from afkd_jax.method import state as state_lib
from afkd_jax.tools import tpu as topology

_MOST = 0.25  # of a device's memory, which images may fill under config.data.placement = 'auto'

Training = Iterator[tuple[augment.Table, jax.Array]]
Evaluation = Iterator[tuple[augment.Table, jax.Array, jax.Array]]


def placement(config: ConfigDict, info: sources.Info, devices: parallel.Devices) -> str:
    """Returns 'device', 'host' or 'stream'; see configs/default.py."""
    wanted = config.data.placement
    if wanted != 'auto':
        return wanted
    # Of this process's own: others tell nothing of their memory. A plan's need not be there.
    device = next(iter(devices.mesh.local_devices), devices.mesh.devices.flat[0])
    memory = topology.memory_of(device)
    if memory is not None and device.platform == 'cpu':
        memory //= devices.mesh.size  # they share it
    needed = (info.train + info.validation + info.test) * int(np.prod(info.image_shape))
    large = memory is not None and needed > _MOST * memory
    anew = config.data.image_size or config.data.randaugment_operations
    return 'stream' if anew or large else 'device'


def table_place(placement: str) -> Any:
    """Returns where a Table's arrays live: whole on every device, or a batch split over them."""
    if placement == 'device':
        return parallel.WHOLE
    split, whole = parallel.SPLIT, parallel.WHOLE
    return augment.Table(split, split, whole, whole, gathered=True)


def like(info: sources.Info, placement: str, batch_size: int) -> augment.Table:
    """Returns the shapes of a batch's Table."""
    device = placement == 'device'
    count = info.train + info.validation + info.test if device else batch_size
    channels = info.image_shape[-1:]
    return augment.Table(
        jax.ShapeDtypeStruct((count, *info.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((count,), jnp.int32),
        jax.ShapeDtypeStruct(channels, jnp.float32),
        jax.ShapeDtypeStruct(channels, jnp.float32),
        gathered=not device,
    )


@dataclasses.dataclass(frozen=True)
class Feed(abc.ABC):
    """The batches of a run.

    Attributes:
      config: valid.
      info: of its images.
      devices: to which they come.
      fingerprint: of the images.
    """

    config: ConfigDict
    info: sources.Info
    devices: parallel.Devices
    fingerprint: str

    placement: ClassVar[str]

    @property
    def order(self) -> batches.Order:
        """The order in which the training images come."""
        return batches.Order(self.config.seed, self.info.train, self.config.batch_size)

    @abc.abstractmethod
    def training(self, first_step: int) -> contextlib.AbstractContextManager[Training]:
        """Gives (table, index) of the steps from this one on, counted from 0."""

    @abc.abstractmethod
    def evaluation(self, places: Sequence[int]) -> contextlib.AbstractContextManager[Evaluation]:
        """Gives (table, index, mask) of batches that visit every place once; see batches.padded."""

    def _padded(self, places: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        return batches.padded(places, self.config.eval_batch_size)


@dataclasses.dataclass(frozen=True)
class InMemory(Feed):
    """All images in memory: of every device, or of the host.

    Attributes:
      table: of all of them.
    """

    table: augment.Table

    @abc.abstractmethod
    def batch(self, index: np.ndarray) -> tuple[augment.Table, jax.Array]:
        """Returns (table, index) of these images."""

    @contextlib.contextmanager
    def training(self, first_step: int) -> Iterator[Training]:
        """See Feed."""
        last = self.order.end_of(self.config.epochs)
        yield (self.batch(self.order.indices(step)) for step in range(first_step, last))

    @contextlib.contextmanager
    def evaluation(self, places: Sequence[int]) -> Iterator[Evaluation]:
        """See Feed."""
        put = self.devices.split
        yield ((*self.batch(index), put(mask)) for index, mask in self._padded(places))


@dataclasses.dataclass(frozen=True)
class Absent(Feed):
    """The batches of images that are not there, for who needs their shapes alone."""

    placement: str = 'device'

    def training(self, first_step: int) -> contextlib.AbstractContextManager[Training]:
        """There are none."""
        raise NotImplementedError

    def evaluation(self, places: Sequence[int]) -> contextlib.AbstractContextManager[Evaluation]:
        """There are none."""
        raise NotImplementedError


class OnDevice(InMemory):
    """All images whole on every device, gathered there."""

    placement = 'device'

    def batch(self, index: np.ndarray) -> tuple[augment.Table, jax.Array]:
        """See InMemory."""
        return self.table, self.devices.split(index)


class OnHost(InMemory):
    """All images in the memory of the host, `mean` and `std` on the devices."""

    placement = 'host'

    def batch(self, index: np.ndarray) -> tuple[augment.Table, jax.Array]:
        """See InMemory."""
        put, table = self.devices.split, self.table
        # Several processes each gather whole batches, which takes less than the transfer.
        pixels, labels = put(table.pixels[index]), put(table.labels[index])
        return table.replace(pixels=pixels, labels=labels, gathered=True), put(index)


@dataclasses.dataclass(frozen=True)
class Streamed(Feed):
    """Images read and decoded when they are needed; every process makes its devices' rows.

    Attributes:
      dataset: where they come from.
      mean: of augment.Table, on the devices.
      std: likewise.
      tell: is given a line for each image that cannot be decoded.
      broken: places of those met so far.
    """

    dataset: sources.Dataset
    mean: jax.Array
    std: jax.Array
    tell: Callable[[str], None]
    broken: set[int] = dataclasses.field(default_factory=set)

    placement = 'stream'

    def _table(self, made: stream.Batches, rows: stream.Rows) -> augment.Table:
        _count_broken(self.config, made, rows, self.broken, self.tell)
        put = functools.partial(self.devices.split_rows, size=made.size)
        return augment.Table(put(rows.pixels), put(rows.labels), self.mean, self.std, gathered=True)

    @contextlib.contextmanager
    def training(self, first_step: int) -> Iterator[Training]:
        """See Feed."""
        config, order, put = self.config, self.order, self.devices.split
        last, size = order.end_of(config.epochs), config.batch_size
        rows = self.devices.rows(size)
        made = stream.Batches(
            self.dataset, order.indices, last, size, rows, config.seed, config.data.max_corrupt
        )
        with stream.stream(made, first_step, config.data.workers) as batch:
            steps = range(first_step, last)
            yield ((self._table(made, next(batch)), put(order.indices(step))) for step in steps)

    @contextlib.contextmanager
    def evaluation(self, places: Sequence[int]) -> Iterator[Evaluation]:
        """See Feed. The mask leaves out what cannot be decoded."""
        devices, size = self.devices, self.config.eval_batch_size
        padded, rows = self._padded(places), devices.rows(size)
        made = _of_list(self.dataset, [index for index, _ in padded], size, rows)

        def batch(own, index, mask):
            whole = devices.split_rows(mask[rows] & (own.broken < 0), size)
            return self._table(made, own), devices.split(index), whole

        with stream.stream(made, 0, self.config.data.workers) as parts:
            yield (batch(own, *rest) for own, rest in zip(parts, padded, strict=True))


def _of_list(
    dataset: sources.Dataset, places: list[np.ndarray], size: int, rows: np.ndarray
) -> stream.Batches:
    return stream.Batches(dataset, places.__getitem__, len(places), size, rows, None)


def _count_broken(
    config: ConfigDict,
    made: stream.Batches,
    rows: stream.Rows,
    broken: set[int],
    tell: Callable[[str], None],
) -> None:
    """Adds images that cannot be decoded to `broken`, naming each once.

    Raises:
      UserError: there are more than config.data.max_corrupt.
    """
    for place in rows.broken[rows.broken >= 0].tolist():
        if place in broken:
            continue
        broken.add(place)
        why, most = made.why(place), config.data.max_corrupt
        if len(broken) > most:
            raise UserError(
                f'config.data.max_corrupt: {len(broken)} images cannot be decoded, {most} may be '
                f'passed over; the last is {why}; mend or remove it, or allow more'
            )
        tell(f'warning: an image is passed over ({len(broken)} of at most {most}): {why}')


def _measured(
    config: ConfigDict, dataset: sources.Dataset, tell: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and std of the training images, which are all read for it."""
    tell('reading the training images once, for their mean and standard deviation')
    size = min(256, dataset.info.train)
    padded = batches.padded(dataset.info.places('train'), size)
    made = _of_list(dataset, [index for index, _ in padded], size, np.arange(size))
    counts, broken = 0, set()
    with stream.stream(made, 0, config.data.workers) as parts:
        for own, (_, mask) in zip(parts, padded, strict=True):
            _count_broken(config, made, own, broken, lambda words: None)
            counts += augment.histogram(own.pixels[mask & (own.broken < 0)])
    return augment.moments(counts)


def feed(
    config: ConfigDict,
    dataset: sources.Dataset,
    devices: parallel.Devices,
    tell: Callable[[str], None],
) -> Feed:
    """Returns the batches of a config's images, of which some kinds are read into memory now.

    Raises:
      UserError: some images cannot be decoded, or the workers have no room.
    """
    info = dataset.info
    where, given = placement(config, info, devices), None
    if len(config.data.mean):
        given = tuple(np.array(value, np.float32) for value in (config.data.mean, config.data.std))
    if where == 'stream':
        rows = sum(len(devices.rows(n)) for n in (config.batch_size, config.eval_batch_size))
        stream.check_room(config.data.workers, rows * math.prod(info.image_shape))
        mean, std = devices.replicate(given or _measured(config, dataset, tell))
        fingerprint = f'stream {dataset.fingerprint()}'  # in memory the images themselves are known
        return Streamed(config, info, devices, fingerprint, dataset, mean, std, tell)
    splits = dataset.load()
    table = augment.table(splits, given)
    fingerprint = state_lib.fingerprint((table.pixels, table.labels))
    if where == 'device':
        return OnDevice(config, info, devices, fingerprint, devices.replicate(table))
    mean, std = devices.replicate((table.mean, table.std))
    table = table.replace(mean=mean, std=std)
    return OnHost(config, info, devices, fingerprint, table)
