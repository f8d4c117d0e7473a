"""Log lines: the means over the steps since the last line, written one step later."""

import jax

from afkd_jax.method import metrics
from afkd_jax.report.trackers import TrainValues
from afkd_jax.training.clock import Clock
from afkd_jax.training.health import Health
from afkd_jax.training.session import Session


class Lines:
    """At most one line is pending, so that fetching its sums does not hold up the next step."""

    def __init__(self, session: Session, clock: Clock, health: Health):
        self._session, self._clock, self._health = session, clock, health
        self._pending: tuple[int, metrics.Sums] | None = None

    def add(self, step: int, sums: metrics.Sums) -> None:
        """Makes the sums up to this step the pending line."""
        self._pending = step, sums

    def write(self) -> None:
        """Writes the pending line, if there is one; waits for its step."""
        if self._pending is None:
            return
        session = self._session
        session.check_held()
        (step, device_sums), self._pending = self._pending, None
        sums = jax.device_get(device_sums)
        self._health.check_line(step, sums)
        session.checkpoints.poll()
        images, seconds = self._clock.lap(step)
        session.snapshot.progress.epoch.add(sums)
        session.snapshot.progress.epoch.add_time(images, seconds)
        if sums.steps:
            epoch, speed = session.run.order.epoch_at(step), images / seconds if images else None
            skipped = int(sums.skipped)
            session.tracker.handle(TrainValues(step, epoch, metrics.means(sums), speed, skipped))
