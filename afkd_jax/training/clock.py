"""The clock: images per second of training, without evaluation, saving and compilation."""

import time


class Clock:
    """Measures speed since the last log line, and since the start of the epoch.

    Args:
      batch_size: images per step.
      step: steps taken so far.
    """

    def __init__(self, batch_size: int, step: int):
        self._batch_size = batch_size
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts both measurements anew, after anything that is not training."""
        self._epoch = self._line = (time.perf_counter(), step)

    def _speed(self, since: tuple[float, int], step: int) -> float:
        then, first_step = since
        return (step - first_step) * self._batch_size / (time.perf_counter() - then)

    def line(self, step: int) -> float:
        """Returns images per second since the last line, and starts the next one."""
        speed, self._line = self._speed(self._line, step), (time.perf_counter(), step)
        return speed

    def epoch(self, step: int) -> float:
        """Returns images per second since the last restart; 0 if there was no step."""
        return self._speed(self._epoch, step)
