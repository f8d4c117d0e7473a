"""The session: what a process holds while it trains in a workdir."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.store import Checkpoints, Snapshot
from afkd_jax.devices import environment, processes
from afkd_jax.devices.signals import Interrupt
from afkd_jax.report.console import log, working
from afkd_jax.report.jsonl import JsonLines
from afkd_jax.report.terminal import Terminal
from afkd_jax.report.trackers import Start, Tracker, Trackers
from afkd_jax.report.versions import versions
from afkd_jax.training import resume
from afkd_jax.training.clock import Spent
from afkd_jax.training.evaluate import Evaluator
from afkd_jax.training.profile import Profile
from afkd_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Session:
    """A run that is ready to train.

    Attributes:
      snapshot: from which it starts; its progress is updated while it trains.
      train_step: compiled, see Run.compiled_step.
      profile: of config.profile.
      check_held: raises if the workdir's lock was lost.
      spent: the time of the whole run.
    """

    run: Run
    workdir: pathlib.Path
    checkpoints: Checkpoints
    snapshot: Snapshot
    train_step: Callable[..., Any]
    evaluator: Evaluator
    tracker: Tracker
    profile: Profile
    check_held: Callable[[], None]
    interrupt: Interrupt
    spent: Spent

    @property
    def last_step(self) -> int:
        """The number of steps of the whole run."""
        return self.run.order.end_of(self.run.config.epochs)


@contextlib.contextmanager
def opened(
    run: Run,
    workdir: pathlib.Path,
    step: int | None,
    interrupt: Interrupt,
    tracker: Trackers,
    spent: Spent,
    extend: bool = False,
) -> Iterator[Session]:
    """Claims the workdir, restores or initialises the state, compiles, and opens the trackers.

    Args:
      run: what is trained.
      workdir: of the run.
      step: of the checkpoint to resume from; None for the newest.
      interrupt: entered.
      tracker: of config.trackers, in the primary process; closed at the end.
      spent: the time of this process.
      extend: whether config.epochs may be more than the run in the workdir has.

    Raises:
      UserError: the workdir or its checkpoints cannot be used, or config.profile does not fit.
    """
    primary, config = processes.is_primary(), run.config
    last_step = run.order.end_of(config.epochs)
    profile = Profile(config, workdir, last_step)
    with contextlib.ExitStack() as stack:
        claim = workdir_lib.claimed(workdir, config, log, extend) if primary else None
        check_held = processes.raise_on_all(
            lambda: stack.enter_context(claim) if claim else lambda: None
        )
        processes.raise_on_all(lambda: workdir_lib.check_shared(workdir))
        metadata = {'versions': versions() | environment.rounding(), 'devices': run.devices.name}
        checkpoints = stack.enter_context(
            Checkpoints(workdir, run.origin(), metadata, config.checkpoint.keep, check_held)
        )
        with working('initialising'):
            snapshot = resume.restore_or_init(
                run, workdir, checkpoints, metadata, step, spent, extend
            )
        if primary:  # only now that images and checkpoints are known to be those of the run
            if line := workdir_lib.moved(workdir, config):
                log(line)
            workdir_lib.write_config(workdir, config)
            run.image_facts.write(workdir)
        first_step, progress = int(snapshot.state.step), snapshot.progress
        log(
            f'{workdir}: {len(run.cohort.names)} networks, {last_step} steps, on {run.devices.name}'
        )
        interrupt.effect = 'stops after the compilation'
        with spent.on('compile'):
            train_step, evaluator = run.compiled_step(), Evaluator(run)
        required = [*([JsonLines(workdir)] if primary else []), Terminal()]
        tracker.required = [stack.enter_context(one) for one in required]
        stack.enter_context(tracker)
        tracker.handle(
            Start(
                first_step,
                last_step,
                run.cohort.names,
                config,
                run.devices.name,
                epoch_ended=progress.epoch.empty,
            )
        )
        yield Session(
            run,
            workdir,
            checkpoints,
            snapshot,
            train_step,
            evaluator,
            tracker,
            profile,
            check_held,
            interrupt,
            spent,
        )
