"""The loop: steps, log lines, evaluations and checkpoints, in their order."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.checkpoints.store import Checkpoints, Point
from afkd_jax.devices import processes
from afkd_jax.devices.signals import Interrupt
from afkd_jax.method import metrics
from afkd_jax.report import figures as curves
from afkd_jax.report import metrics_log as writer
from afkd_jax.report import summary
from afkd_jax.training import resume
from afkd_jax.training import run as run_lib
from afkd_jax.training.evaluate import Evaluator
from afkd_jax.training.health import Watch

_tell = writer.console.print


def train(
    config: ConfigDict, workdir: pathlib.Path, step: int | None, interrupt: Interrupt
) -> dict[str, Any] | None:
    """Trains from the workdir's newest checkpoint, or from the start, to the end of the config.

    Args:
      config: valid.
      workdir: made if it is not there.
      step: go on from the checkpoint of this step, and set aside what is newer; None: the newest.
      interrupt: entered; ends the run early.

    Returns:
      The summary; None if a signal ended the run early (with a checkpoint, if it had begun).

    Raises:
      UserError: the config, its images, devices, the workdir or its checkpoints do not fit, the
        disk cannot be written, or the run has diverged.
    """
    started = time.perf_counter()
    workdir_lib.check(workdir, config)
    if step is not None:
        workdir_lib.check_begun(workdir)
    finished = processes.told(workdir_lib.summary(workdir) if step is None else None)
    if finished:
        _tell(f'{workdir}: this run is finished; its summary:')
        return finished
    run = processes.in_turn(lambda: run_lib.prepare(config, writer.tell_all))
    processes.same({'images': run.feed.fingerprint})
    if any(processes.share(interrupt.requested)):
        _tell(f'{workdir}: stopped by a signal before it began; the same command continues')
        return None
    last_step = run.order.end_of(config.epochs)
    names = run.cohort.names
    with contextlib.ExitStack() as stack:
        check_held = processes.together(
            lambda: (
                stack.enter_context(workdir_lib.claimed(workdir, config, _tell))
                if processes.leads()
                else lambda: None
            )
        )
        processes.together(lambda: workdir_lib.check_shared(workdir))
        about = {'versions': writer.versions(), 'devices': run.devices.name}
        checkpoints = stack.enter_context(
            Checkpoints(workdir, run.origin(), about, config.checkpoint.keep, check_held)
        )
        point = resume.begin(run, workdir, checkpoints, about, step)
        first_step = int(point.state.step)
        _tell(
            f'{workdir}: {len(names)} networks, {last_step} steps, on {run.devices.name}; compiling'
        )
        begin = time.perf_counter()
        train_step, evaluate = run.compiled_step(), Evaluator(run)
        compile_s = time.perf_counter() - begin
        out = stack.enter_context(
            writer.Writer(
                workdir if processes.leads() else None,
                names,
                first_step,
                point.progress.evaluated,
                last_step,
                config.epochs,
            )
        )
        out.header(config, run.devices.name, first_step)
        watch = Watch(run, workdir, point.progress, out)
        loop = _Loop(
            run,
            point,
            started,
            train_step,
            evaluate,
            checkpoints,
            out,
            watch,
            check_held,
            interrupt,
        )
        loop.until(last_step)
        stopped = loop.stopped
        result = summary.build(
            run,
            loop.state,
            loop.scores(),
            None if stopped else evaluate.edges(loop.state.networks),
            loop.progress(),
            compile_s,
        )
        processes.same({'arrays': result['fingerprint']})

        by_class = None
        if not stopped:
            test = loop.test or evaluate(loop.state.networks, 'test')
            by_class = summary.classes(run.cohort, test)

        def write() -> None:
            check_held()
            if not stopped:
                curves.draw(workdir)
                workdir_lib.write_json(workdir / 'classes.json', by_class)
            workdir_lib.write_json(workdir / 'summary.json', result)

        processes.together(write if processes.leads() else lambda: None)
        if stopped:
            _tell(
                f'{workdir}: stopped by a signal, with a checkpoint at step {loop.step} of '
                f'{last_step}; the same command continues'
            )
            return None
    return result


class _Loop:
    """Trains until a step.

    Attributes:
      state: of the last step.
      step: how many steps were taken; state.step, known without a fetch.
      stopped: whether a signal, to any of the processes, ended it early.
      test: scores of the last step on test; None if this process has not evaluated them.

    Args:
      run: what is trained.
      point: from which it goes on; its progress is kept up to date.
      started: time.perf_counter() at which this process started.
      train_step: Run.compiled_step.
      evaluate: of the run.
      checkpoints: of the run.
      out: of the run.
      watch: of the run.
      check_held: raises if the workdir is no longer ours.
      interrupt: ends the loop after the step, and an evaluation after a batch.
    """

    def __init__(
        self,
        run: run_lib.Run,
        point: Point,
        started: float,
        train_step: Callable[..., Any],
        evaluate: Evaluator,
        checkpoints: Checkpoints,
        out: writer.Writer,
        watch: Watch,
        check_held: Callable[[], None],
        interrupt: Interrupt,
    ):
        self._run, self._train_step, self._evaluate = run, train_step, evaluate
        self._checkpoints, self._out, self._watch = checkpoints, out, watch
        self._check_held, self._interrupt = check_held, interrupt
        self._agreed = processes.Agreement(run.devices.mesh)
        self.stopped = self._wished_to_save = False
        self.test: summary.Scores | None = None
        self.state, self._sums, self._progress = point.state, point.sums, point.progress
        self.step = self._saved_step = int(point.state.step)
        self._started = started - self._progress.wall_s
        self._no_sums = run.no_sums()
        # The line that is still to be written: (step, sums).
        self._pending: tuple[int, metrics.Sums] | None = None
        self._saved_at = time.perf_counter()
        self._restart_clocks()

    def until(self, last_step: int) -> None:
        """Trains up to `last_step`, or until a signal asks to stop; ends with a checkpoint."""
        self._end_epoch()  # of one that was stopped before its evaluation
        with self._run.feed.training(self.step) as batches:
            self._train(last_step, batches)
        if self.step > self._saved_step:
            self._save()
        self._checkpoints.wait()

    def _train(self, last_step: int, batches: Iterator[Any]) -> None:
        log_every, first = self._run.config.log_every, self.step
        while self.step < last_step:
            save = self._agree()
            if self.stopped:
                break
            before, batch = self._sums, next(batches)
            self.state, self._sums = self._train_step(self.state, before, *batch)
            self.step += 1
            # At most two steps on their way, so that a signal does not wait for many.
            before.steps.block_until_ready()
            if self.step == first + 1:  # the first step also warms up: it is not timed
                self._sums.steps.block_until_ready()
                self._restart_clocks()
            self._log()  # of the steps before: only now that the next one is on its way
            if self._epoch() or self.step % log_every == 0:
                self._pending, self._sums = (self.step, self._sums), self._no_sums
            if self._epoch():
                self._end_epoch()
            elif save or self._steps_are_over():
                self._save()

    def progress(self) -> Progress:
        """Returns what is known of the run beside its arrays."""
        self._progress.wall_s = time.perf_counter() - self._started
        return self._progress

    def scores(self) -> dict[str, summary.Scores]:
        """Returns the last scores of each split that was evaluated."""
        return {
            split: summary.Scores(known['accuracy'], known['cross_entropy'], known['top5'])
            for split, known in self._progress.scores.items()
        }

    def _epoch(self) -> int:
        """Returns the number of the epoch that ends with this step, counted from 1; 0 if none."""
        epoch = int(self._run.order.epoch_at(self.step))
        return epoch if epoch and self.step == self._run.order.end_of(epoch) else 0

    def _agree(self, may_save: bool = True) -> bool:
        """Returns whether a checkpoint is due by the clock, and notes whether a signal came.

        To any of the processes, which all ask at the same points. The clock is that of process 0;
        its wish may come true one step later, and is not repeated.
        """
        minutes = self._run.config.checkpoint.every_minutes
        due = 0 < minutes <= (time.perf_counter() - self._saved_at) / 60 and processes.leads()
        wish = may_save and due and not self._wished_to_save
        stop, save = self._agreed(self._interrupt.requested, wish)
        self._wished_to_save |= wish
        self.stopped |= stop
        return save

    def _steps_are_over(self) -> bool:
        every = self._run.config.checkpoint.every_steps
        return bool(every) and self.step % every == 0

    def _save(self) -> None:
        """Writes what is to be logged up to here, and then starts to write a checkpoint."""
        self._log()
        self._check_held()
        self._watch.finite(metrics.fetch(self._sums))
        self._out.sync()
        self._checkpoints.save(self.step, Point(self.state, self._sums, self.progress()))
        self._saved_at, self._saved_step = time.perf_counter(), self.step
        self._wished_to_save = False
        self._restart_clocks()

    def _restart_clocks(self) -> None:
        """Starts the clocks of img/s; called after whatever is not training."""
        self._epoch_clock = self._line_clock = (time.perf_counter(), self.step)

    def _speed(self, clock: tuple[float, int], step: int) -> float:
        """Returns images per second since the clock's (time, step); 0 if there was no step."""
        then, first_step = clock
        images = (step - first_step) * self._run.config.batch_size
        return images / (time.perf_counter() - then)

    def _log(self) -> None:
        """Writes the line that is pending, if there is one; waits for its step."""
        if self._pending is None:
            return
        self._check_held()
        (step, sums), self._pending = self._pending, None
        sums = metrics.fetch(sums)
        self._watch.line(step, sums)
        self._checkpoints.poll()
        if sums.steps:
            speed = self._speed(self._line_clock, step)
            epoch = self._run.order.epoch_at(step)
            self._out.train(step, epoch, metrics.means(sums), speed, int(sums.skipped))
        self._line_clock = (time.perf_counter(), step)

    def _end_epoch(self) -> None:
        """Evaluates and saves, if an epoch ends here and has not been evaluated yet."""
        epoch = self._epoch()
        if not epoch or self._progress.evaluated == self.step:
            return
        self._log()
        if speed := self._speed(self._epoch_clock, self.step):
            self._progress.images_per_s.append(speed)
        evaluated = self._evaluate_epoch(epoch)
        if evaluated or self.step > self._saved_step:
            self._save()
        if evaluated:
            self._out.epoch(epoch)

    def _evaluate_epoch(self, epoch: int) -> bool:
        """Evaluates on validation, and on test where a network is better than it has ever been.

        The last epoch is evaluated on test in any case. Without a validation split every epoch
        is, for its curve: nothing is selected. Returns False if a signal asked to stop meanwhile:
        then nothing is known yet, and the epoch is evaluated when the run goes on.
        """

        def stop() -> bool:
            self._agree(may_save=False)
            return self.stopped

        networks, progress = self.state.networks, self._progress
        split = self._run.info.held_out()[0]
        if (scores := self._evaluate(networks, split, stop)) is None:
            return False
        known, improved = {split: scores}, []
        if split == 'validation':
            improved = progress.improved(scores.accuracy)
            if improved or epoch == self._run.config.epochs:
                if (test := self._evaluate(networks, 'test', stop)) is None:
                    return False
                known = {'test': test, **known}
        for name, values in known.items():
            self._out.evaluation(self.step, epoch, name, values)
            progress.scores[name] = {'step': self.step, **values.record()}
        for k in improved:
            progress.best[k] = {
                'validation': scores.accuracy[k],
                'test': test.accuracy[k],
                'step': self.step,
            }
        progress.evaluated, self.test = self.step, known.get('test')
        return True
