"""The loop."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import chex
from ml_collections import ConfigDict

from afkd_jax import curves, metrics, summary, writer
from afkd_jax import run as run_lib
from afkd_jax import state as state_lib
from afkd_jax import step as step_lib
from afkd_jax.checkpoints import Checkpoints, Progress
from afkd_jax.data.batches import Order
from afkd_jax.evaluate import Evaluator
from afkd_jax.interrupt import Interrupt


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Trains from the workdir's last checkpoint, or from the start, to the end of the config.

    Args:
      config: valid.
      workdir: made if it is not there.

    Returns:
      The summary; None if a signal ended the run early (its checkpoint is written).

    Raises:
      UserError: the config, its images, devices or the workdir do not fit.
    """
    started = time.perf_counter()
    run = run_lib.prepare(config)
    writer.claim(workdir, config)
    if (workdir / 'summary.json').exists():
        writer.console.print(f'{workdir}: this run is finished; its summary:')
        return json.loads((workdir / 'summary.json').read_text())

    order = Order(config.seed, run.info.train, config.batch_size)
    last_step = order.end_of(config.epochs)
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    if checkpoints.latest is None:
        state, progress = run.initial_state(), Progress.start(len(config.networks))
    else:
        state, progress = checkpoints.restore(
            state_lib.abstract(run.cohort), run.devices.replicated
        )
        writer.console.print(f'{workdir}: continues from step {int(state.step)} of {last_step}')

    begin = time.perf_counter()
    train_step = _compiled(run, state, order)
    compile_s = time.perf_counter() - begin
    evaluate = Evaluator(run)
    names, first_step = run.cohort.names, int(state.step)
    with writer.Writer(workdir, names, first_step, last_step, config.epochs) as out:
        out.header(config, first_step)
        loop = _Loop(run, order, train_step, evaluate, checkpoints, out, state, progress, started)
        loop.until(last_step)
        checkpoints.close()
        state = loop.state
        if loop.step < last_step:
            writer.console.print(
                f'{workdir}: stopped by a signal, with a checkpoint at step {loop.step} of '
                f'{last_step}; the same command continues'
            )
            return None
        validation = evaluate(state.networks, 'validation') if run.info.validation else None
        test = evaluate(state.networks, 'test')
        out.evaluation(last_step, config.epochs, 'test', test)
    curves.draw(workdir)
    networks, ensemble = summary.entries(run.cohort, validation, test, progress)
    # The first epoch also warms up; it counts only where it is the only one.
    speeds = progress.images_per_s[1:] or progress.images_per_s
    result = {
        'networks': networks,
        'ensemble': ensemble,
        'steps': last_step,
        'epochs': config.epochs,
        'images_per_s': statistics.median(speeds),
        'compile_s': compile_s,
        'wall_s': loop.wall_s(),
        'device': writer.device_name(),
        'fingerprint': state_lib.fingerprint(state),
    }
    writer.write_json(workdir / 'summary.json', result)
    return result


def _compiled(run: run_lib.Run, state: state_lib.TrainState, order: Order) -> Callable[..., Any]:
    """Returns the compiled training step: (state, sums, batch's indices) -> (state, sums).

    Compiled ahead of time, so that a second compilation is an error and not a slow step.
    """
    data = run.config.data

    def train_step(state, sums, images, index_B, key):
        return step_lib.train_step(
            run.cohort, data.pad, data.flip, state, sums, images, index_B, key
        )

    chex.clear_trace_counter()
    mapped = run.devices.map(
        chex.assert_max_traces(train_step, n=1),
        split=(False, False, False, True, False),
        donate=(0,),
    )
    key = run.devices.replicate(run.key(1))
    index = run.devices.split(order.indices(0))
    compiled = mapped.lower(state, _no_sums(run), run.images, index, key).compile()
    return lambda state, sums, index: compiled(state, sums, run.images, index, key)


def _no_sums(run: run_lib.Run) -> metrics.Sums:
    return run.devices.replicate(metrics.zeros(step_lib.value_shapes(run.cohort)))


class _Loop:
    """Steps, log lines, evaluations and checkpoints, in their order.

    Attributes:
      state: of the last step.
      step: how many steps were taken; state.step, known without a fetch.
    """

    def __init__(
        self, run, order, train_step, evaluate, checkpoints, out, state, progress, started
    ):
        self._run, self._order, self._train_step = run, order, train_step
        self._evaluate, self._checkpoints, self._out = evaluate, checkpoints, out
        self.state, self.step, self._progress = state, int(state.step), progress
        self._started = started - progress.wall_s

    def wall_s(self) -> float:
        """Returns the seconds spent on the run so far, over all restarts."""
        return time.perf_counter() - self._started

    def until(self, last_step: int) -> None:
        """Trains to the last step; a signal ends it earlier. Leaves a checkpoint either way."""
        order, log_every = self._order, self._run.config.log_every
        no_sums = sums = _no_sums(self._run)
        pending = None
        self._restart_clocks()
        with Interrupt() as interrupt:
            while self.step < last_step and not interrupt.requested:
                index = self._run.devices.split(order.indices(self.step))
                before = sums
                self.state, sums = self._train_step(self.state, sums, index)
                self.step += 1
                # At most two steps on their way, so that a signal does not wait for many.
                before.steps.block_until_ready()
                if pending:  # fetched only now that the next step is on its way
                    self._log(*pending)
                    pending = None
                epoch = int(order.epoch_at(self.step))
                epoch_ends = self.step == order.end_of(epoch)
                if epoch_ends or self.step % log_every == 0:
                    pending, sums = (self.step, sums), no_sums
                if epoch_ends:
                    self._log(*pending)
                    pending = None
                    self._end_epoch(epoch)
            if pending:
                self._log(*pending)
            self._save()

    def _restart_clocks(self) -> None:
        """Starts the clocks of img/s; called after whatever is not training."""
        self._epoch_clock = self._line_clock = (time.perf_counter(), self.step)

    def _speed(self, clock: tuple[float, int], step: int) -> float:
        """Returns images per second since the clock's (time, step)."""
        then, first_step = clock
        images = (step - first_step) * self._run.config.batch_size
        return images / (time.perf_counter() - then)

    def _log(self, step: int, sums: metrics.Sums) -> None:
        means = metrics.means(sums)  # waits for the step
        speed = self._speed(self._line_clock, step)
        self._out.train(step, self._order.epoch_at(step), means, speed)
        self._line_clock = (time.perf_counter(), step)

    def _end_epoch(self, epoch: int) -> None:
        self._progress.images_per_s.append(self._speed(self._epoch_clock, self.step))
        self._evaluate_epoch(epoch)
        self._save()
        self._out.epoch(epoch)
        self._restart_clocks()

    def _evaluate_epoch(self, epoch: int) -> None:
        """Evaluates on validation, and on test where a network is better than it has ever been.

        Without a validation split the test split is evaluated, for its curve: nothing is
        selected.
        """
        split = 'validation' if self._run.info.validation else 'test'
        scores = self._evaluate(self.state.networks, split)
        self._out.evaluation(self.step, epoch, split, scores)
        if split == 'test':
            return
        improved = self._progress.improved(scores.accuracy)
        if improved:
            test = self._evaluate(self.state.networks, 'test')
            for k in improved:
                self._progress.best[k] = {
                    'validation': scores.accuracy[k],
                    'test': test.accuracy[k],
                    'step': self.step,
                }

    def _save(self) -> None:
        self._progress.wall_s = self.wall_s()
        self._checkpoints.save(self.step, self.state, self._progress)
