"""Clocks: the speed of training, and what the time of a run was spent on."""

import contextlib
import time
from collections.abc import Iterator

from afkd_jax.checkpoints.progress import Progress


class Clock:
    """Measures training without evaluation, saving and compilation.

    Args:
      batch_size: images per step.
      step: steps taken so far.
    """

    def __init__(self, batch_size: int, step: int):
        self._batch_size = batch_size
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts a lap, after anything that is not training."""
        self._since, self._step = time.perf_counter(), step

    def lap(self, step: int) -> tuple[int, float]:
        """Returns the images and seconds of the lap that ends with this step; starts the next."""
        images, since = (step - self._step) * self._batch_size, self._since
        self.restart(step)
        return images, self._since - since


class Spent:
    """The seconds since this was made, by what they are spent on; each second counts once.

    data: reading images, and waiting for batches. compile: the initial state and the steps. train.
    evaluate. save: writing checkpoints, and restoring one. other: the rest.
    """

    KINDS = ('data', 'compile', 'train', 'evaluate', 'save', 'other')

    def __init__(self):
        self._seconds: dict[str, float] = dict.fromkeys(self.KINDS, 0.0)
        self._kind, self._since = 'other', time.perf_counter()

    def _switch(self, kind: str) -> str:
        before, now = self._kind, time.perf_counter()
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Counts what happens inside as this kind; also within another kind."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def resume(self, progress: Progress) -> None:
        """Adds what the run has spent in earlier processes."""
        for kind, seconds in progress.seconds.items():
            self._seconds[kind] += seconds
        self._seconds['other'] += progress.wall_s - sum(progress.seconds.values())

    def store(self, progress: Progress) -> None:
        """Writes the seconds so far, of all processes, to the progress."""
        self._switch(self._kind)
        progress.seconds = dict(self._seconds)
        progress.wall_s = sum(self._seconds.values())
