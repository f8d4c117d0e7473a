"""In which order the images come: a function of (seed, epoch), so nothing about it is stored."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from afkd_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Order:
    """One endless stream of whole passes over the training images, cut into batches.

    Pass e is a permutation drawn from (seed, e). Batch t holds places t B .. (t + 1) B - 1 of
    the stream, so where B does not divide the number of images a batch holds the end of one pass
    and the start of the next: every image comes exactly once in every pass, and every batch is
    full. Any batch is found without the ones before it.

    Attributes:
      seed: of the run.
      examples: number of training images, N.
      batch_size: B, at most N.
    """

    seed: int
    examples: int
    batch_size: int

    def indices(self, step: int) -> np.ndarray:
        """Returns the images of the step (counted from 0): int32 [B] in 0 .. N - 1."""
        start = step * self.batch_size
        epoch, place = divmod(start, self.examples)
        first = _permutation(self.seed, epoch, self.examples)[place : place + self.batch_size]
        missing = self.batch_size - len(first)
        if not missing:
            return first
        return np.concatenate([first, _permutation(self.seed, epoch + 1, self.examples)[:missing]])

    def end_of(self, epoch: float) -> int:
        """Returns the number of steps after which `epoch` passes are complete."""
        return config_lib.steps_in(epoch, self.examples, self.batch_size)

    def epoch_at(self, step: int) -> float:
        """Returns how many passes are complete after `step` steps, with its fraction."""
        return step * self.batch_size / self.examples


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order of one pass; two are kept, as a batch may need the next pass too."""
    return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)


def padded(places: Sequence[int], batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (indices int32 [B], mask bool [B]) that visit every place once, in order.

    The last batch is filled up with the first place and mask False.
    """
    places, batches = np.asarray(places, np.int32), []
    for start in range(0, len(places), batch_size):
        index = places[start : start + batch_size]
        filling = np.full(batch_size - len(index), places[0], np.int32)
        mask = np.arange(batch_size) < len(index)
        batches.append((np.concatenate([index, filling]), mask))
    return batches
