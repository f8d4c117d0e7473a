"""config.profile: a trace of some training steps, for TensorBoard and Perfetto."""

import pathlib
from typing import Any

import jax

from afkd_jax.config import Config
from afkd_jax.devices import processes
from afkd_jax.errors import field_error, typed_line
from afkd_jax.report.console import log


class Profile:
    """The trace of the steps of config.profile, by the primary process.

    It is no result of the run: if it fails, a warning says so, and the run continues.

    Args:
      config: checked.
      workdir: of the run; the trace is written to its directory 'profile'.
      last_step: of the run.

    Attributes:
      on: whether steps are traced now.

    Raises:
      UserError: steps are named that the run does not have.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, last_step: int):
        first, last = config.profile or (1, 0)
        if last > last_step:
            rule = f'steps of the run, which has {last_step}'
            raise field_error('profile', rule, config.profile)
        self._steps = range(first, last + 1) if processes.is_primary() else range(0)
        self._folder, self.on = workdir / 'profile', False

    def starts_with(self, step: int) -> bool:
        """Returns whether to start() before this step, counted from 1; also amid the steps."""
        return step in self._steps and not self.on

    def ends_with(self, step: int) -> bool:
        """Returns whether to stop() after this step."""
        return self.on and step + 1 not in self._steps

    def start(self, arrays: Any) -> None:
        """Starts the trace as soon as these arrays, of the steps before it, are computed."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down the host
        jax.block_until_ready(arrays)
        try:
            self._folder.mkdir(exist_ok=True)  # JAX would fail when it stops, and never trace again
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self.on = True
        except Exception as error:
            self._fail(error)

    def stop(self, arrays: Any) -> None:
        """Writes the trace as soon as these arrays, of its last step, are computed."""
        self.on = False
        try:
            jax.block_until_ready(arrays)
            jax.profiler.stop_trace()
            log(f'{self._folder}: the trace is written')
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._steps = range(0)
        log(f'warning: {self._folder}: no trace is written ({typed_line(error)})')
