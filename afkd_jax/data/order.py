"""The order of the images: a function of (seed, epoch), so no part of it is stored."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from afkd_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Order:
    """One endless stream of whole passes over the N training images, cut into batches of B.

    Pass e is a permutation drawn from (seed, e). Batch t holds entries t B .. (t + 1) B - 1 of the
    stream, so where B does not divide N a batch holds the end of one pass and the start of the
    next: every image occurs exactly once in every pass, and every batch is full. Any batch can be
    computed without those before it.
    """

    seed: int
    examples: int  # N
    batch_size: int  # B, at most N

    def indices(self, step: int) -> np.ndarray:
        """Returns the images of a step (counted from 0): int32 [B] in 0 .. N - 1."""
        epoch, start = divmod(step * self.batch_size, self.examples)
        first = _permutation(self.seed, epoch, self.examples)[start : start + self.batch_size]
        missing = self.batch_size - len(first)
        if not missing:
            return first
        return np.concatenate([first, _permutation(self.seed, epoch + 1, self.examples)[:missing]])

    def end_of(self, epoch: float) -> int:
        """Returns the number of steps after which `epoch` passes are complete."""
        return config_lib.steps_in(epoch, self.examples, self.batch_size)

    def epoch_at(self, step: int) -> float:
        """Returns how many passes, with the fraction, are complete after `step` steps."""
        return step * self.batch_size / self.examples


@functools.lru_cache(maxsize=2)  # a batch may need the next pass too
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)


def padded_batches(indices: Sequence[int], batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (indices int32 [B], mask bool [B]) that contain every index once, in order.

    The last batch is filled up with the first index and mask False.
    """
    batches = []
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        index = np.full(batch_size, indices[0], np.int32)
        index[: len(part)] = part
        batches.append((index, np.arange(batch_size) < len(part)))
    return batches
