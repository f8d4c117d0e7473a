"""Images that are read and decoded when they are needed, ahead of the step, through Grain.

A batch is a function of its number alone, so the order is the same whatever the number of threads
and processes, and a run goes on at any step.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags

from afkd_jax.data import decode
from afkd_jax.data.dataset import Dataset
from afkd_jax.errors import UserError

_AHEAD = 4  # batches that each thread or process may have ready
_MOST_THREADS = 16
_SHARED = pathlib.Path('/dev/shm')
_WHOLE = -1  # in place of an image's place: it is not broken


@dataclasses.dataclass(frozen=True)
class Rows:
    """This process's rows of a batch.

    Attributes:
      pixels: uint8 [R, H, W, C].
      labels: int32 [R].
      broken: int32 [R], the places of images that could not be decoded, -1 for the others. In
        training the next image that can be stands in for it; in evaluation its pixels are 0.
    """

    pixels: np.ndarray
    labels: np.ndarray
    broken: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches by their number: a random access source for Grain.

    Attributes:
      dataset: where the images come from.
      places: number of a batch -> int [B], the places of its images.
      count: how many batches there are.
      size: B.
      rows: int [R], those of a batch that this process makes.
      seed: of the random crops of training; None: the centre, for evaluation.
      max_corrupt: see configs/default.py.
    """

    dataset: Dataset
    places: Callable[[int], np.ndarray]
    count: int
    size: int
    rows: np.ndarray
    seed: int | None
    max_corrupt: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the fields of Rows."""
        places, count = self.places(number)[self.rows], len(self.rows)
        pixels = np.empty((count, *self.dataset.info.image_shape), np.uint8)
        labels, broken = np.zeros(count, np.int32), np.full(count, _WHOLE, np.int32)
        for row, place in enumerate(places.tolist()):
            try:
                pixels[row], labels[row] = self._example(number, place)
            except decode.Broken:
                broken[row], pixels[row] = place, 0
                if self.seed is not None and self.max_corrupt:
                    pixels[row], labels[row] = self._next_example(number, place)
        return pixels, labels, broken

    def _example(self, number: int, place: int) -> tuple[np.ndarray, int]:
        """Returns the image as the networks see it, and its label."""
        image, label = self.dataset[place]
        view, shape = self.dataset.view, self.dataset.info.image_shape
        if self.seed is None:
            seen = view.evaluation(image, shape[2])
        else:
            # The 1: (seed, n, 0) would be (seed, n), of which the order of epoch n is drawn.
            rng = np.random.default_rng((self.seed, number, place, 1))
            seen = view.training(image, shape[2], rng)
        if seen.shape != shape:
            raise decode.Broken(f'it is {seen.shape}, others {shape}')
        return seen, label

    def _next_example(self, number: int, place: int) -> tuple[np.ndarray, int]:
        """Returns the next training image that can be decoded."""
        train = self.dataset.info.train
        for after in range(1, self.max_corrupt + 1):
            with contextlib.suppress(decode.Broken):
                return self._example(number, (place + after) % train)
        raise UserError(
            f'config.data.max_corrupt: {self.why(place)}; nor can the next {self.max_corrupt} '
            f'images of the training order be decoded, and {self.max_corrupt} may be passed over; '
            'mend or remove them'
        )

    def why(self, place: int) -> str:
        """Returns what is wrong with an image that is broken, and where it is stored."""
        try:
            self._example(0, place)
        except decode.Broken as error:
            return f'{self.dataset.name(place)}: {error}'
        return f'{self.dataset.name(place)}: could not be decoded at first, but can be now'


def _in_worker(index: int, count: int) -> None:
    """Lets a worker end with the process that trains, however that ends."""

    def end():
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Lets processes be started that never see a signal to stop, which a terminal sends to all.

    They inherit the mask of the thread that starts them; who trains ends them when it is ready.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def check_room(workers: int, batch_bytes: int) -> None:
    """Refuses workers whose batches do not fit into shared memory: there they would be killed.

    Args:
      workers: processes.
      batch_bytes: of a batch of every stream that is open at one time.
    """
    needed = workers * (_AHEAD + 1) * batch_bytes
    if not needed or not _SHARED.is_dir():  # no Linux
        return
    free = shutil.disk_usage(_SHARED).free
    if needed > free:
        raise UserError(
            f'config.data.workers: {workers} processes need {needed:,} bytes of shared memory for '
            f'the batches they have ready, but {_SHARED} has {free:,}; use fewer, or 0 for '
            'threads, or give it more room (docker run --shm-size)'
        )


@contextlib.contextmanager
def stream(batches: Batches, first: int, workers: int) -> Iterator[Iterator[Rows]]:
    """Gives the batches from number `first` on, in their order; what it has begun ends with it.

    Args:
      batches: which.
      first: number of the first.
      workers: processes that decode; 0: threads of this one.
    """
    if not flags.FLAGS.is_parsed():  # Grain asks for its own, also where there is no command line
        flags.FLAGS.mark_as_parsed()
    threads = max(1, min(_MOST_THREADS, os.cpu_count() or 1))
    read = grain.ReadOptions(
        num_threads=1 if workers else threads,
        prefetch_buffer_size=_AHEAD if workers else max(_AHEAD, threads),
    )
    source = grain.MapDataset.source(batches)[first:]
    iterable = source.to_iter_dataset(read)
    workers = min(workers, len(source))
    with contextlib.ExitStack() as stack:
        begun = []
        if workers:
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD)
            iterable = iterable.mp_prefetch(options, worker_init_fn=_in_worker)
            with _without_signals():
                iterator = iter(iterable)
                stack.callback(iterator.close)
                begun = [next(iterator)]  # they are started by it
        else:
            iterator = iter(iterable)
            stack.callback(iterator.close)
        yield (Rows(*fields) for fields in itertools.chain(begun, iterator))
