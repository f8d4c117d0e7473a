"""Requests to the loop, the same for all processes at the same step: stop, or save by the clock."""

import time

from afkd_jax.devices import processes
from afkd_jax.training.session import Session


class Requests:
    """Signals to any process, and the primary's clock for checkpoints.

    Attributes:
      stopped: whether a signal, to any process, asks to stop.
    """

    def __init__(self, session: Session):
        self._interrupt = session.interrupt
        self._minutes = session.run.config.checkpoint.every_minutes
        self._any_process = processes.AnyProcess(session.run.devices.mesh)
        self.stopped = self._save_requested = False
        self.saved()

    def saved(self) -> None:
        """Restarts the clock, after a checkpoint."""
        self._saved_at, self._save_requested = time.perf_counter(), False

    def poll(self, may_save: bool = True) -> bool:
        """Returns whether a checkpoint is due by the clock; updates `stopped`.

        Every process makes the same calls. Among several, a request takes effect one call later,
        and is not repeated until the checkpoint is written.
        """
        due = 0 < self._minutes <= (time.perf_counter() - self._saved_at) / 60
        request = may_save and due and processes.is_primary() and not self._save_requested
        stop, save = self._any_process(self._interrupt.requested, request)
        self._save_requested |= request
        self.stopped |= stop
        return save
