"""Where a run begins, or goes on."""

import pathlib
from typing import Any

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.checkpoints.store import Checkpoints, Point, Restored
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.report import metrics_log as writer
from afkd_jax.training.run import Run

_tell = writer.console.print


def begin(
    run: Run,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    about: dict[str, Any],
    step: int | None,
) -> Point:
    """Returns where the run goes on, or its start, which is written as a checkpoint of its own.

    So a workdir with a metrics.jsonl has, or had, a checkpoint; and a disk that cannot hold one is
    noticed before any step. What is newer than the checkpoint is set aside.

    Args:
      run: what is trained.
      workdir: claimed.
      checkpoints: of the workdir.
      about: 'versions' and 'devices' of this process.
      step: of the checkpoint to go on from; None for the newest that is whole.

    Raises:
      UserError: there is no such checkpoint, or all there were are gone, damaged or foreign.
    """
    restored = checkpoints.restore(run.abstract(), step)
    if restored is None:
        if processes.told((workdir / 'metrics.jsonl').exists()):
            raise UserError(
                f'{checkpoints.folder}: the checkpoints of this run, which has begun, are gone; '
                'put one back, or name another --workdir to start anew'
            )
        progress = Progress.start(len(run.cohort.names))
        point = Point(run.initial_state(), run.no_sums(), progress)
        checkpoints.save(0, point)
        checkpoints.wait()
        return point
    if processes.leads():
        _set_aside(workdir, restored)
    processes.together(lambda: None)  # from here on all see the same checkpoints
    last_step = run.order.end_of(run.config.epochs)
    _tell(f'{workdir}: continues from step {int(restored.point.state.step)} of {last_step}')
    changes = config_lib.differences(config_lib.flatten(restored.about), config_lib.flatten(about))
    if changes:
        _tell(f'warning: {"; ".join(changes)}: the run goes on, but not to the same bits')
    return restored.point


def _set_aside(workdir: pathlib.Path, restored: Restored) -> None:
    """Moves what the run that goes on cannot use."""
    for path, why in restored.rejected.items():
        _tell(
            f'warning: {path}: this checkpoint {why}; it is set aside as '
            f'{workdir_lib.set_aside(workdir.absolute(), path)}'
        )
    # First the summary of an end that is to be reached once more: now the run is not finished.
    if workdir_lib.summary(workdir):
        workdir_lib.set_aside(workdir, workdir / 'summary.json')
    for path in restored.newer:
        workdir_lib.set_aside(workdir.absolute(), path)
