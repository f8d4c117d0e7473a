"""Streaming: images are read and decoded ahead of the step, with Grain, in threads or processes.

A batch is a function of its number alone, so the order does not depend on the number of threads
and processes, and a run can resume at any step. Imports no JAX: worker processes import this.
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
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from afkd_jax.data import decode
from afkd_jax.data.dataset import Dataset
from afkd_jax.errors import UserError

_AHEAD = 4  # batches that each thread or process may have ready
_MOST_THREADS = 16
_SHARED = pathlib.Path('/dev/shm')
_NOT_BROKEN = -1


class Rows(NamedTuple):
    """This process's rows of a batch."""

    pixels: np.ndarray  # uint8 [R, H, W, C]
    labels: np.ndarray  # int32 [R]
    # int32 [R]: the indices of images that cannot be decoded, -1 for the others. In training the
    # next image that can be decoded replaces it; in evaluation its pixels are 0.
    broken: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches by their number: a random-access source for Grain."""

    dataset: Dataset
    indices: Callable[[int], np.ndarray]  # number of a batch -> int [B], the indices of its images
    count: int
    size: int  # B
    rows: np.ndarray  # int [R], the rows of a batch that this process computes
    seed: int | None  # of the random crops in training; None: evaluation's central crop
    max_corrupt: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Rows:
        indices, count = self.indices(number)[self.rows], len(self.rows)
        pixels = np.empty((count, *self.dataset.info.image_shape), np.uint8)
        labels, broken = np.zeros(count, np.int32), np.full(count, _NOT_BROKEN, np.int32)
        for row, index in enumerate(indices.tolist()):
            try:
                pixels[row], labels[row] = self._example(number, index)
            except decode.DecodeError:
                broken[row], pixels[row] = index, 0
                if self.seed is not None and self.max_corrupt:
                    pixels[row], labels[row] = self._next_example(number, index)
        return Rows(pixels, labels, broken)

    def _example(self, number: int, index: int) -> tuple[np.ndarray, int]:
        """Returns (the networks' view of an image, label)."""
        image, label = self.dataset[index]
        view, shape = self.dataset.view, self.dataset.info.image_shape
        if self.seed is None:
            seen = view.evaluation(image, shape[2])
        else:
            # The 1: (seed, n, 0) would equal (seed, n), from which epoch n's order is drawn.
            rng = np.random.default_rng((self.seed, number, index, 1))
            seen = view.training(image, shape[2], rng)
        return decode.of_shape(seen, shape), label

    def _next_example(self, number: int, index: int) -> tuple[np.ndarray, int]:
        train = self.dataset.info.train
        for after in range(1, self.max_corrupt + 1):
            with contextlib.suppress(decode.DecodeError):
                return self._example(number, (index + after) % train)
        raise UserError(
            f'config.data.max_corrupt: {self.reason(index)}; nor can the next {self.max_corrupt} '
            'images of the training order be decoded, and only so many may be skipped; repair or '
            'remove them'
        )

    def fault(self, index: int) -> str | None:
        """Returns where a broken image is stored and why it cannot be decoded; else None."""
        try:
            self._example(0, index)
        except decode.DecodeError as error:
            return f'{self.dataset.name(index)}: {error}'
        return None

    def reason(self, index: int) -> str:
        """Returns fault() of an image that could not be decoded before."""
        now = f'{self.dataset.name(index)}: could not be decoded at first, but can be now'
        return self.fault(index) or now


def _end_with_parent(index: int, count: int) -> None:
    """Makes a worker process end when the training process ends, for whatever reason."""

    def end():
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in processes that are started inside.

    They inherit the mask of the thread that starts them. A terminal sends Ctrl-C to all processes,
    but the training process ends its workers itself, after its checkpoint.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Rejects workers whose batches do not fit into shared memory, where they would be killed.

    `batch_bytes` is the size of one batch of every stream that is open at the same time.
    """
    needed = workers * (_AHEAD + 1) * batch_bytes
    if not needed or not _SHARED.is_dir():  # not Linux
        return
    free = shutil.disk_usage(_SHARED).free
    if needed > free:
        raise UserError(
            f'config.data.workers: {workers} processes need {needed:,} bytes of shared memory for '
            f'the batches they have ready, but {_SHARED} has {free:,}; use fewer, or 0 for '
            'threads, or enlarge it (docker run --shm-size)'
        )


@contextlib.contextmanager
def stream(batches: Batches, first: int, workers: int) -> Iterator[Iterator[Rows]]:
    """Yields an iterator over the batches from number `first` on; 0 workers: threads decode."""
    if not flags.FLAGS.is_parsed():  # Grain reads its own flags, even without a command line
        flags.FLAGS.mark_as_parsed()
    threads = max(1, min(_MOST_THREADS, os.cpu_count() or 1))
    read = grain.ReadOptions(
        num_threads=1 if workers else threads,
        prefetch_buffer_size=_AHEAD if workers else max(_AHEAD, threads),
    )
    source = grain.MapDataset.source(batches)[first:]  # pyright: ignore[reportArgumentType]
    iterable = source.to_iter_dataset(read)
    workers = min(workers, len(source))
    if workers:
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=_AHEAD)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_end_with_parent)
    with contextlib.ExitStack() as stack:
        with _signals_blocked() if workers else contextlib.nullcontext():
            iterator = stack.enter_context(contextlib.closing(iter(iterable)))
            started = [next(iterator)] if workers else []  # this starts the processes
        yield itertools.chain(started, iterator)
