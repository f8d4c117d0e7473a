"""Where a run starts: from a checkpoint, or from the initial state."""

import pathlib
from typing import Any

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import files
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.checkpoints.store import Checkpoints, Restored, Snapshot
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.report.console import log
from afkd_jax.training.clock import Spent
from afkd_jax.training.run import Run


def restore_or_init(
    run: Run,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    step: int | None,
    spent: Spent,
    extend: bool,
) -> Snapshot:
    """Returns the restored snapshot, or the initial one, which is written as a checkpoint.

    So a workdir with a metrics.jsonl has, or had, a checkpoint; and a disk that cannot hold one is
    noticed before any step. What is newer than the restored checkpoint is set aside.

    Args:
      run: what is trained.
      workdir: claimed.
      checkpoints: of the workdir.
      metadata: 'versions' and 'devices' of this process.
      step: of the checkpoint to resume from; None for the newest that is whole.
      spent: continued where the restored run's stopped.
      extend: whether the checkpoints may be of fewer epochs.

    Raises:
      UserError: there is no such checkpoint, or all there were are gone, damaged or another run's.
    """
    with spent.on('save'):
        restored = checkpoints.restore(run.abstract(), step)
    if restored is None:
        if processes.broadcast((workdir / 'metrics.jsonl').exists()):
            raise UserError(
                f'{checkpoints.folder}: the checkpoints of this run, which has begun, are gone; '
                'put one back, or name another --workdir to start anew'
            )
        progress = Progress.start(len(run.cohort.names))
        with spent.on('compile'):
            snapshot = Snapshot(run.initial_state(), run.zero_sums(), progress)
        with spent.on('save'):
            checkpoints.save(0, snapshot)
            checkpoints.wait()
        return snapshot
    if restored.epochs < run.config.epochs and not extend:
        raise UserError(
            f'{workdir}: its checkpoints are of a run of {restored.epochs} epochs, not of '
            f'{run.config.epochs}; add --extend to train it longer'
        )
    spent.resume(restored.snapshot.progress)
    if processes.is_primary():
        _set_aside(workdir, restored)
    processes.raise_on_all(lambda: None)  # from here on all see the same checkpoints
    last_step = run.order.end_of(run.config.epochs)
    step = int(restored.snapshot.state.step)
    log(f'{workdir}: continues from step {step} of {last_step}')
    if restored.epochs < run.config.epochs:
        log(
            f'{workdir}: extended from {restored.epochs} to {run.config.epochs} epochs; schedules '
            'are fractions of the run, so from here on they are those of the longer run'
        )
        extension = {'step': step, 'epochs': restored.epochs}
        restored.snapshot.progress.extensions.append(extension)
        checkpoints.save(step, restored.snapshot)  # so that it is from now on the longer run's
        checkpoints.wait()
    changes = config_lib.differences(
        config_lib.flatten(restored.metadata), config_lib.flatten(metadata)
    )
    if changes:
        log(f'warning: {"; ".join(changes)}: the run continues, but not to the same bits')
    return restored.snapshot


def _set_aside(workdir: pathlib.Path, restored: Restored) -> None:
    """Moves what the resumed run cannot use."""
    for path, why in restored.rejected.items():
        target = files.set_aside(workdir.absolute(), path)
        log(f'warning: {path}: this checkpoint {why}; it is set aside as {target}')
    # First the summary, because the run is no longer finished.
    if workdir_lib.finished_summary(workdir):
        for name in ('summary.json', 'classes.json', 'predictions.npz', 'curves.png'):
            if (workdir / name).exists():
                files.set_aside(workdir, workdir / name)
    for path in restored.newer:
        files.set_aside(workdir.absolute(), path)
