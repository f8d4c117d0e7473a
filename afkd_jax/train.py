"""The loop: steps, log lines, evaluations and checkpoints, in their order."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from afkd_jax import curves, metrics, summary, writer
from afkd_jax import run as run_lib
from afkd_jax import state as state_lib
from afkd_jax.checkpoints import Checkpoints, Progress
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
      UserError: the config, its images, devices or the workdir do not fit, or a loss is no number.
    """
    started = time.perf_counter()
    run = run_lib.prepare(config)
    with Interrupt() as interrupt:
        writer.claim(workdir, config)
        if (workdir / 'summary.json').exists():
            writer.console.print(f'{workdir}: this run is finished; its summary:')
            return json.loads((workdir / 'summary.json').read_text())

        last_step = run.order.end_of(config.epochs)
        checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        if checkpoints.latest is None:
            state, progress = run.initial_state(), Progress.start(len(config.networks))
        else:
            state, progress = checkpoints.restore(run.abstract_state())
            writer.console.print(f'{workdir}: continues from step {int(state.step)} of {last_step}')
        first_step = int(state.step)
        writer.console.print(
            f'{workdir}: {len(run.cohort.names)} networks, {last_step} steps, on '
            f'{run.devices.name}; compiling'
        )
        begin = time.perf_counter()
        train_step, evaluate = run.compiled_step(state), Evaluator(run)
        compile_s = time.perf_counter() - begin
        names = run.cohort.names
        with writer.Writer(workdir, names, first_step, last_step, config.epochs) as out:
            out.header(config, run.devices.name, first_step)
            loop = _Loop(
                run, state, progress, started - progress.wall_s, train_step, evaluate,
                checkpoints, out,
            )  # fmt: skip
            loop.until(last_step, interrupt)
            checkpoints.close()
            state = loop.state
            if loop.step < last_step or interrupt.requested:
                writer.console.print(
                    f'{workdir}: stopped by a signal, with a checkpoint at step {loop.step} of '
                    f'{last_step}; the same command continues'
                )
                return None
            scores = {
                split: loop.scores.get(split) or evaluate(state.networks, split)
                for split in run.info.held_out()
            }
            edges = evaluate.edges(state.networks)
        result = summary.build(run, state, scores, edges, progress, compile_s, loop.wall_s())
        writer.write_json(workdir / 'summary.json', result)
        curves.draw(workdir)
    return result


class _Loop:
    """Trains until a step.

    Attributes:
      state: of the last step.
      step: how many steps were taken; state.step, known without a fetch.
      scores: of the state, by split, as far as the loop has evaluated it.

    Args:
      run: what is trained.
      state: from which it goes on.
      progress: of the run; kept up to date.
      started: time.perf_counter() at which the run would have started without a stop.
      train_step: Run.compiled_step.
      evaluate: the evaluator of the run.
      checkpoints: where to save.
      out: where to write.
    """

    def __init__(
        self,
        run: run_lib.Run,
        state: state_lib.TrainState,
        progress: Progress,
        started: float,
        train_step: Callable[..., Any],
        evaluate: Evaluator,
        checkpoints: Checkpoints,
        out: writer.Writer,
    ):
        self.state, self.step, self.scores = state, int(state.step), {}
        self._run, self._progress, self._started = run, progress, started
        self._train_step, self._evaluate = train_step, evaluate
        self._checkpoints, self._out = checkpoints, out

    def wall_s(self) -> float:
        """Returns the seconds spent on the run so far, over all restarts."""
        return time.perf_counter() - self._started

    def until(self, last_step: int, interrupt: Interrupt) -> None:
        """Trains to the last step; a signal ends it earlier. Leaves a checkpoint either way."""
        run, order = self._run, self._run.order
        no_sums = sums = run.no_sums()
        pending, first = None, True
        self._restart_clocks()
        while self.step < last_step and not interrupt.requested:
            index = run.devices.split(order.indices(self.step))
            before = sums
            self.state, sums = self._train_step(self.state, sums, index)
            self.step, self.scores = self.step + 1, {}
            # At most two steps on their way, so that a signal does not wait for many.
            before.steps.block_until_ready()
            if first:  # the first step also warms up: it is not timed
                sums.steps.block_until_ready()
                self._restart_clocks()
                first = False
            if pending:  # fetched only now that the next step is on its way
                self._log(*pending)
                pending = None
            epoch = int(order.epoch_at(self.step))
            epoch_ends = self.step == order.end_of(epoch)
            if epoch_ends or self.step % run.config.log_every == 0:
                pending, sums = (self.step, sums), no_sums
            if epoch_ends:
                self._log(*pending)
                pending = None
                if speed := self._speed(self._epoch_clock, self.step):
                    self._progress.images_per_s.append(speed)
                self._evaluate_epoch(epoch)
                self._save()
                self._out.epoch(epoch)
                self._restart_clocks()
        if pending:
            self._log(*pending)
        elif sums is not no_sums:
            self._log(self.step, sums)
        self._save()

    def _save(self) -> None:
        self._progress.wall_s = self.wall_s()
        self._checkpoints.save(self.step, self.state, self._progress)

    def _restart_clocks(self) -> None:
        """Starts the clocks of img/s; called after whatever is not training."""
        self._epoch_clock = self._line_clock = (time.perf_counter(), self.step)

    def _speed(self, clock: tuple[float, int], step: int) -> float:
        """Returns images per second since the clock's (time, step); 0 if there was no step."""
        then, first_step = clock
        images = (step - first_step) * self._run.config.batch_size
        return images / (time.perf_counter() - then)

    def _log(self, step: int, sums: metrics.Sums) -> None:
        means = metrics.means(sums)  # waits for the step
        speed = self._speed(self._line_clock, step)
        self._out.train(step, self._run.order.epoch_at(step), means, speed)
        self._line_clock = (time.perf_counter(), step)

    def _evaluate_epoch(self, epoch: int) -> None:
        """Evaluates on validation, and on test where a network is better than it has ever been.

        The last epoch is evaluated on test in any case. Without a validation split every epoch
        is, for its curve: nothing is selected.
        """
        split = self._run.info.held_out()[0]
        scores = self.scores[split] = self._evaluate(self.state.networks, split)
        improved = self._progress.improved(scores.accuracy) if split == 'validation' else []
        if improved or (split == 'validation' and epoch == self._run.config.epochs):
            test = self.scores['test'] = self._evaluate(self.state.networks, 'test')
            self._out.evaluation(self.step, epoch, 'test', test)
            for k in improved:
                self._progress.best[k] = {
                    'validation': scores.accuracy[k],
                    'test': test.accuracy[k],
                    'step': self.step,
                }
        self._out.evaluation(self.step, epoch, split, scores)
