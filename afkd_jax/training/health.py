"""What a reader of the log would be alarmed by: numbers that are not finite, dead adversaries."""

import math
import pathlib
from typing import Any

from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.method.metrics import Sums
from afkd_jax.report.metrics_log import Writer
from afkd_jax.training.run import Run

# A discriminator whose mean outputs are this near to 0 or 1, on own and on teacher's maps, passes
# next to no gradient through its sigmoid. Our choice.
SATURATED = 0.02

# So many skipped steps, in whole log lines, and the run counts as lost. Our choice.
GIVE_UP = 50


class Watch:
    """Looks at the sums of each log line, and before each checkpoint.

    Args:
      run: what is watched.
      workdir: where nonfinite.json is written.
      progress: of the run; what was seen is counted there.
      out: where warnings go.
    """

    def __init__(self, run: Run, workdir: pathlib.Path, progress: Progress, out: Writer):
        self._run, self._workdir, self._progress, self._out = run, workdir, progress, out

    def line(self, step: int, sums: Sums) -> None:
        """Counts what a log line's sums tell, once per line.

        Args:
          step: of the line.
          sums: fetched.

        Raises:
          UserError: see finite(); or the last GIVE_UP steps were all skipped.
        """
        self.finite(sums)
        progress = self._progress
        progress.skipped += int(sums.skipped)
        progress.skipped_in_a_row += int(sums.skipped)
        if sums.steps:
            progress.skipped_in_a_row = 0
            self._saturation(step, sums)
        if sums.skipped:
            self._out.warning(
                step,
                f'{sums.skipped} steps skipped, {progress.skipped} in the whole run; '
                f'{self._culprit(sums)}',
            )
        if progress.skipped_in_a_row >= GIVE_UP:
            raise UserError(
                f'step {step}: the last {progress.skipped_in_a_row} steps were all skipped, '
                f'{self._culprit(sums)}; the run does not recover and is ended: '
                'lower config.logit.learning_rate, in a new --workdir'
            )

    def finite(self, sums: Sums) -> None:
        """Refuses to go on after a step with a value that is no finite number, unless told to.

        Such a step has changed no array. Either way nonfinite.json tells what is known of it.

        Args:
          sums: fetched.

        Raises:
          UserError: there was such a step, and config.on_nonfinite is 'stop'.
        """
        if not sums.skipped:
            return
        path = self._workdir / 'nonfinite.json'
        if processes.leads():
            workdir_lib.write_json(path, self._diagnosis(sums))
        if self._run.config.on_nonfinite == 'stop':
            raise UserError(
                f'{self._culprit(sums)}; the run has diverged and is ended, its checkpoints are '
                'from before: lower config.logit.learning_rate, in a new --workdir, or continue '
                f'with --config.on_nonfinite=skip (see {path})'
            )

    def _bad(self, sums: Sums) -> list[tuple[str, int | None, float]]:
        """Returns (value's name, network counted from 0 or None, value) of the first skipped step.

        Losses come first, and of them the cross-entropy: what else is bad follows from it.
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

    def _culprit(self, sums: Sums) -> str:
        name, k, value = self._bad(sums)[0]
        whose = '' if k is None else f' of network {k + 1} ({self._run.cohort.names[k]})'
        return f'step {sums.first_skipped}: {name}{whose} is {value}'

    def _diagnosis(self, sums: Sums) -> dict[str, Any]:
        """Returns what is known of the first skipped step; in words what JSON has no number for."""

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
                | {name: plain(value[k]) for name, value in values.items() if value.ndim}
                for k in range(len(names))
            ],
            **{name: plain(float(value)) for name, value in values.items() if not value.ndim},
            'skipped_since_last_line': int(sums.skipped),
            'training_images': self._run.order.indices(step - 1).tolist(),
        }

    def _saturation(self, step: int, sums: Sums) -> None:
        limit, counts = self._run.config.saturation_steps, self._progress.saturated
        if not limit or 'd_own' not in sums.totals:
            return
        outputs = [sums.totals[name] / sums.steps for name in ('d_own', 'd_teacher')]
        for k, (own, teacher) in enumerate(zip(*outputs, strict=True)):
            dead = all(min(output, 1 - output) < SATURATED for output in (own, teacher))
            counts[k] = counts[k] + int(sums.steps) if dead else 0
            tell = counts[k] >= limit
            if tell and not self._progress.warned[k]:
                self._out.warning(
                    step,
                    f'the discriminator of network {k + 1} ({self._run.cohort.names[k]}) has been '
                    f'saturated for {counts[k]} steps: mean output {own:.4f} on own and '
                    f"{teacher:.4f} on its teacher's maps; its network learns next to nothing from "
                    'it (a lower config.discriminator.learning_rate may help)',
                )
            self._progress.warned[k] = tell
