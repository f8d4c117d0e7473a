"""Health checks: values that are not finite, and discriminators that are saturated."""

import math
from typing import Any

import jax

from afkd_jax.checkpoints import files
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.method.metrics import Sums
from afkd_jax.report.trackers import Warned
from afkd_jax.training.session import Session

# A discriminator whose mean outputs are this close to 0 or 1, on the student's and the teacher's
# maps, passes hardly any gradient through its sigmoid. Our choice.
SATURATED = 0.02

# After so many skipped steps, in whole log lines, the run is ended. Our choice.
GIVE_UP = 50


class Health:
    """Checks the sums of each log line, and before each checkpoint."""

    def __init__(self, session: Session):
        self._run, self._workdir, self._tracker = session.run, session.workdir, session.tracker
        self._progress = session.snapshot.progress

    def check_line(self, step: int, sums: Sums) -> None:
        """Checks a log line's sums, once per line.

        Args:
          step: of the line.
          sums: fetched.

        Raises:
          UserError: see check_finite; or the last GIVE_UP steps were all skipped.
        """
        self.check_finite(sums)
        progress, skipped = self._progress, int(sums.skipped)
        progress.skipped += skipped
        progress.skipped_in_a_row += skipped
        if sums.steps:
            progress.skipped_in_a_row = 0
            self._check_saturation(step, sums)
        if skipped:
            text = f'{skipped} steps skipped, {progress.skipped} in the whole run; '
            self._tracker.handle(Warned(step, text + self._first_bad(sums)))
        if progress.skipped_in_a_row >= GIVE_UP:
            raise UserError(
                f'step {step}: the last {progress.skipped_in_a_row} steps were all skipped, '
                f'{self._first_bad(sums)}; the run does not recover and is ended: '
                'lower config.logit.learning_rate, in a new --workdir'
            )

    def check_finite(self, sums: Sums) -> None:
        """Writes nonfinite.json after a step with a value that is not finite, and ends the run.

        Such a step has changed no array. With config.on_nonfinite = 'skip' the run continues.

        Raises:
          UserError: there was such a step, and config.on_nonfinite is 'stop'.
        """
        sums = jax.device_get(sums)
        if not sums.skipped:
            return
        path = self._workdir / 'nonfinite.json'
        if processes.is_primary():
            files.write_json(path, self._diagnosis(sums))
        if self._run.config.on_nonfinite == 'stop':
            raise UserError(
                f'{self._first_bad(sums)}; the run has diverged and is ended, its checkpoints are '
                'from before: lower config.logit.learning_rate, in a new --workdir, or continue '
                f'with --config.on_nonfinite=skip (see {path})'
            )

    def _bad(self, sums: Sums) -> list[tuple[str, int | None, float]]:
        """Returns (value's name, network counted from 0 or None, value) of the first skipped step.

        Losses come first, and the cross-entropy before the others, which follow from it.
        """
        values = sums.skipped_values
        order = sorted(
            values, key=lambda name: (name.startswith('grad_norm'), name != 'cross_entropy', name)
        )
        rows = [
            (name, k if values[name].ndim else None, float(value))
            for name in order
            for k, value in enumerate(values[name].reshape(-1))
        ]
        return [row for row in rows if not math.isfinite(row[2])]

    def _first_bad(self, sums: Sums) -> str:
        name, k, value = self._bad(sums)[0]
        whose = '' if k is None else f' of network {k + 1} ({self._run.cohort.names[k]})'
        return f'step {sums.first_skipped}: {name}{whose} is {value}'

    def _diagnosis(self, sums: Sums) -> dict[str, Any]:
        """Returns the facts of the first skipped step, as JSON; non-finite values as strings."""

        def plain(value: float) -> float | str:
            return value if math.isfinite(value) else str(value)

        step, names = int(sums.first_skipped), self._run.cohort.names
        values = {name: value.astype(float) for name, value in sums.skipped_values.items()}
        return {
            'step': step,
            'epoch': self._run.order.epoch_at(step),
            'not_finite': [
                {'value': name, 'network': None if k is None else k + 1, 'is': str(value)}
                for name, k, value in self._bad(sums)
            ],
            'networks': [
                {'name': names[k]}
                | {name: plain(float(value[k])) for name, value in values.items() if value.ndim}
                for k in range(len(names))
            ],
            **{name: plain(float(value)) for name, value in values.items() if not value.ndim},
            'skipped_since_last_line': int(sums.skipped),
            'training_images': self._run.order.indices(step - 1).tolist(),
        }

    def _consequence(self) -> str:
        if self._run.config.discriminator.loss == 'lsgan':  # of a sigmoid, which is flat there
            return 'its network learns next to nothing from it'
        return 'these are at or beyond the goals of its loss, and it learns next to nothing more'

    def _check_saturation(self, step: int, sums: Sums) -> None:
        limit, counts = self._run.config.saturation_steps, self._progress.saturated
        if not limit or 'd_own' not in sums.totals:
            return
        outputs = [sums.totals[name] / sums.steps for name in ('d_own', 'd_teacher')]
        for k, (own, teacher) in enumerate(zip(*outputs, strict=True)):
            if not self._run.cohort.learns(k):
                continue
            saturated = all(min(output, 1 - output) < SATURATED for output in (own, teacher))
            counts[k] = counts[k] + int(sums.steps) if saturated else 0
            warn = counts[k] >= limit
            if warn and not self._progress.warned[k]:
                text = (
                    f'the discriminator of network {k + 1} ({self._run.cohort.names[k]}) has been '
                    f'saturated for {counts[k]} steps: mean output {own:.4f} on own and '
                    f"{teacher:.4f} on its teacher's maps; {self._consequence()} (a lower "
                    'config.discriminator.learning_rate may help)'
                )
                self._tracker.handle(Warned(step, text))
            self._progress.warned[k] = warn
