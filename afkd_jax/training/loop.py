"""The training loop: steps, log lines, evaluations and checkpoints, in their order."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from afkd_jax.checkpoints import files
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.progress import EpochSums
from afkd_jax.checkpoints.store import Checkpoints, Snapshot, checkpoint_paths
from afkd_jax.command import Command, number_or
from afkd_jax.config import Config
from afkd_jax.devices import arrays, processes
from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import EXIT_RESUMABLE, typed_line
from afkd_jax.report import figures, predictions, summary
from afkd_jax.report import trackers as trackers_lib
from afkd_jax.report.console import log, log_from_any, print_json, working
from afkd_jax.report.tables import result_tables
from afkd_jax.report.trackers import EpochEnd, Finished, Tracker, Trackers
from afkd_jax.training import run as run_lib
from afkd_jax.training import session as session_lib
from afkd_jax.training.clock import Clock, Spent
from afkd_jax.training.epochs import EpochEvaluation
from afkd_jax.training.health import Health
from afkd_jax.training.lines import Lines
from afkd_jax.training.requests import Requests
from afkd_jax.training.session import Session


def train(
    config: Config,
    workdir: pathlib.Path,
    step: int | None,
    interrupt: Interrupt,
    extend: bool = False,
) -> dict[str, Any] | None:
    """Trains from the workdir's newest checkpoint, or from the start, to the end of the config.

    Args:
      config: checked.
      workdir: made if it does not exist.
      step: resume from this step's checkpoint, and set newer ones aside; None: from the newest.
      interrupt: entered; ends the run early.
      extend: whether config.epochs may be more than the run in the workdir has.

    Returns:
      The summary; None if a signal ended the run early (with a checkpoint, if it had begun).

    Raises:
      UserError: the config, its images, devices, the workdir or its checkpoints do not fit, the
        disk cannot be written, or the run has diverged.
    """
    spent = Spent()
    workdir_lib.check(workdir, config, extend)
    if step is not None or extend:
        workdir_lib.check_begun(workdir)
    finished = workdir_lib.finished_summary(workdir) if step is None else None
    if finished and extend and finished.get('epochs', 0) < config.epochs:
        finished = None
    if finished := processes.broadcast(finished):
        if processes.broadcast(workdir_lib.moved(workdir, config)):  # are these its images?
            run = processes.primary_first(lambda: run_lib.prepare(config, log_from_any))
            with Checkpoints(workdir, run.origin()) as checkpoints:
                checkpoints.restore(run.abstract())
        log(f'{workdir}: this run is finished; its summary:')
        if processes.is_primary() and not (workdir / 'curves.png').exists():
            _draw(workdir)
        return finished
    made: dict[str, Tracker] = processes.raise_on_all(
        lambda: trackers_lib.create(config, workdir) if processes.is_primary() else {}
    )
    with Trackers(made) as tracker:  # closes them also where the run does not begin
        return _train(config, workdir, step, interrupt, extend, tracker, spent)


def _train(
    config: Config,
    workdir: pathlib.Path,
    step: int | None,
    interrupt: Interrupt,
    extend: bool,
    tracker: Trackers,
    spent: Spent,
) -> dict[str, Any] | None:
    """See train()."""
    with spent.on('data'):
        run = processes.primary_first(lambda: run_lib.prepare(config, log_from_any))
    processes.assert_equal({'images': run.pipeline.fingerprint})
    if not processes.broadcast(bool(checkpoint_paths(workdir))):  # before the workdir is claimed
        processes.raise_on_all(lambda: run.starts)
        processes.assert_equal({'config.init_from': arrays.fingerprint(run.starts)})
    if any(processes.all_gather(interrupt.requested)):
        log(f'{workdir}: stopped by a signal before it began; the same command continues')
        return None
    with session_lib.opened(run, workdir, step, interrupt, tracker, spent, extend) as session:
        loop = Loop(session)
        loop.run()
        with working('writing the result'):
            result = _write_result(session, loop)
    if loop.stopped:
        log(
            f'{workdir}: stopped by a signal, with a checkpoint at step {loop.step} of '
            f'{session.last_step}; the same command continues'
        )
        return None
    return result


class Loop:
    """Trains a session to its last step, or until a signal.

    Attributes:
      state: after the last step.
      step: steps taken; state.step, known without a fetch.
    """

    def __init__(self, session: Session):
        self._session, self._run = session, session.run
        self.state, self._sums = session.snapshot.state, session.snapshot.sums
        self._progress = session.snapshot.progress
        self.step = self._saved_step = int(self.state.step)
        self._zero_sums = self._run.zero_sums()
        self._clock = Clock(self._run.config.batch_size, self.step)
        self._requests = Requests(session)
        self._health = Health(session)
        self._lines = Lines(session, self._clock, self._health)
        self.evaluation = EpochEvaluation(session, self._requests)

    @property
    def stopped(self) -> bool:
        """Whether a signal, to any of the processes, ended the run early."""
        return self._requests.stopped

    def run(self) -> None:
        """Trains; ends with a checkpoint."""
        self._session.interrupt.effect = 'stops after this step, with a checkpoint'
        with self._session.spent.on('train'):
            self._end_epoch()  # of an epoch that was stopped before its evaluation
            try:
                with self._run.pipeline.training(self.step) as batches:
                    self._train(batches)
            finally:
                if self._session.profile.on:
                    self._end_profile()
            if self.step > self._saved_step:
                self._save()
        with self._session.spent.on('save'):
            self._session.checkpoints.wait()
        self._session.interrupt.effect = 'ends when the result is written'

    def _train(self, batches: Iterator[Any]) -> None:
        first = self.step
        while self.step < self._session.last_step:
            save = self._requests.poll()
            if self.stopped:
                break
            with self._session.spent.on('data'):
                batch = next(batches)
            if self._session.profile.starts_with(self.step + 1):
                self._start_profile()
            if self.step == first:  # it also warms up, so it is not timed
                with working('training'):
                    self._take_step(batch)
                    self._sums.steps.block_until_ready()
                self._clock.restart(self.step)
            else:
                self._take_step(batch)
            self._lines.write()  # of earlier steps: only now that the next one is dispatched
            if self._session.profile.ends_with(self.step):
                self._end_profile()
            if self._epoch() or self.step % self._run.config.log_every == 0:
                self._lines.add(self.step, self._sums)
                self._sums = self._zero_sums
            save = save or self._save_due()
            if self._epoch():
                self._end_epoch(save)
            elif save:
                self._save()

    def _take_step(self, batch: Any) -> None:
        before = self._sums
        with jax.profiler.StepTraceAnnotation('train', step_num=self.step + 1):
            self.state, self._sums = self._session.train_step(self.state, before, *batch)
        self.step += 1
        # At most two steps are in flight, so that a signal does not wait for many.
        before.steps.block_until_ready()

    def _start_profile(self) -> None:
        self._lines.write()
        with self._session.spent.on('other'):
            self._session.profile.start((self.state, self._sums))
        self._clock.restart(self.step)

    def _end_profile(self) -> None:
        with self._session.spent.on('other'):
            self._session.profile.stop((self.state, self._sums))
        self._clock.restart(self.step)

    def _epoch(self) -> int:
        """Returns the number of the epoch that ends with this step, counted from 1; 0 if none."""
        epoch = int(self._run.order.epoch_at(self.step))
        return epoch if epoch and self.step == self._run.order.end_of(epoch) else 0

    def _end_epoch(self, save: bool = False) -> None:
        """Evaluates and saves where that is due, if an epoch ends here that has not ended yet."""
        epoch, evaluated = self._epoch(), True
        save = save or epoch % self._run.config.checkpoint.every_epochs == 0
        if not epoch:
            return
        self._lines.write()
        if self.evaluation.due(epoch):
            if self._progress.evaluated == self.step:
                return
            with self._session.spent.on('evaluate'):
                evaluated = self.evaluation(self.state.networks, self.step, epoch)
                if evaluated and self.evaluation.validation:
                    self.state = self._run.with_held_out(self.state, self.evaluation.validation)
            self._clock.restart(self.step)
            save = True  # it may be the best
        elif self._progress.epoch.empty:
            return
        if evaluated:
            self._log_epoch(epoch)
            if save or self.step == self._saved_step:  # then without the epoch's line
                self._save()

    def _log_epoch(self, epoch: int) -> None:
        progress, ended = self._progress, self._progress.epoch
        if ended.images_per_s:
            progress.images_per_s.append(ended.images_per_s)
        self._session.tracker.handle(
            EpochEnd(self.step, epoch, ended.means, ended.images_per_s, ended.skipped)
        )
        progress.epoch = EpochSums()

    def _save_due(self) -> bool:
        every = self._run.config.checkpoint.every_steps
        return bool(every) and self.step % every == 0

    def _save(self) -> None:
        """Writes all log lines up to here, and then starts to write a checkpoint."""
        session = self._session
        self._lines.write()
        session.check_held()
        self._health.check_finite(self._sums)  # waits for the last step
        self._progress.epoch.add_time(*self._clock.lap(self.step))
        with session.spent.on('save'):
            session.tracker.sync()
            session.spent.store(self._progress)
            session.checkpoints.save(self.step, Snapshot(self.state, self._sums, self._progress))
        self._saved_step = self.step
        self._requests.saved()
        self._clock.restart(self.step)


def _write_result(session: Session, loop: Loop) -> dict[str, Any]:
    """Writes summary.json and, of a finished run, classes.json, predictions.npz and curves.png."""
    run, workdir, networks = session.run, session.workdir, loop.state.networks
    progress, classes = session.snapshot.progress, None
    with session.spent.on('evaluate'):
        edges = None if loop.stopped else session.evaluator.edges(networks)
        test = loop.evaluation.test
        if not loop.stopped and test is None:  # the last epoch was evaluated in another process
            test = session.evaluator(networks, 'test')
    fingerprint = run.fingerprint(loop.state)
    session.spent.store(progress)
    result = summary.build(
        run.cohort,
        progress,
        edges,
        method=run.config.method,
        seed=run.config.seed,
        images=run.image_facts.to_json(),
        steps=loop.step,
        epochs=run.config.epochs,
        device=run.devices.name,
        fingerprint=fingerprint,
    )
    processes.assert_equal({'arrays': result['fingerprint']})
    if not loop.stopped:
        assert test
        classes = summary.classes(run.cohort, test)

    def write() -> None:
        session.check_held()
        if classes and test:
            files.write_json(workdir / 'classes.json', classes)
            predictions.write(workdir, test)
        files.write_json(workdir / 'summary.json', result)

    processes.raise_on_all(write if processes.is_primary() else lambda: None)
    if not loop.stopped and processes.is_primary():
        session.tracker.handle(Finished(loop.step, result, _draw(workdir)))
    return result


def _draw(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws curves.png and returns its path; None, with a warning, if that fails."""
    try:
        return figures.draw(workdir)
    except Exception as error:
        log(
            f'warning: {workdir / "curves.png"} cannot be drawn ({typed_line(error)}); '
            'the results are complete, the same command draws it again'
        )
        return None


def main(command: Command, interrupt: Interrupt | None) -> int:
    """--mode train: prints the result; returns the exit code."""
    assert interrupt
    step = number_or(command.options.step, 'step', 0)
    assert not isinstance(step, str)
    options = command.options
    result = train(command.config, command.workdir, step, interrupt, options.extend)
    if result is None:
        return EXIT_RESUMABLE
    for table in result_tables(result):
        log(table)
    log(
        f'{result["steps"]} steps, {result["images_per_s"] or 0:.0f} img/s, {result["device"]}; '
        f'fingerprint {result["fingerprint"][:16]}; written to {command.workdir}'
    )
    if 'seconds' in result:  # not in a summary of an older version
        parts = ', '.join(f'{kind} {seconds:.1f}' for kind, seconds in result['seconds'].items())
        log(f'{result["wall_s"]:.1f} s: {parts}')
    print_json(result)
    return 0
