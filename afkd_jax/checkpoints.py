"""Checkpoints: the state (Orbax) and the run's progress (JSON), written together or not at all."""

import dataclasses
import pathlib

import orbax.checkpoint as ocp

from afkd_jax.errors import UserError
from afkd_jax.state import TrainState


@dataclasses.dataclass
class Progress:
    """What a run must remember beside its state.

    Attributes:
      best: per network and, last, the ensemble: {'validation', 'test', 'step'}, accuracies in
        percent where the validation accuracy was highest (the first such epoch); None before.
      images_per_s: training speed of each epoch so far, without each process's first step.
      wall_s: seconds spent up to this checkpoint, over all restarts.
    """

    best: list[dict | None]
    images_per_s: list[float]
    wall_s: float

    @classmethod
    def start(cls, networks: int) -> 'Progress':
        """Returns the progress before the first step of a run of K = `networks`."""
        return cls([None] * (networks + 1), [], 0.0)

    def improved(self, validation: list[float]) -> list[int]:
        """Returns whose validation accuracy is higher than ever before; ties keep the first."""
        return [
            k
            for k, best in enumerate(self.best)
            if best is None or validation[k] > best['validation']
        ]


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: they lie in its folder `checkpoints`.
      keep: how many of the last are kept; None to read only.
    """

    def __init__(self, workdir: pathlib.Path, keep: int | None):
        self.folder = workdir.absolute() / 'checkpoints'
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=keep is not None,
            # On a CPU a copy to the host may be no copy, and the next step reuses the memory.
            enable_async_checkpointing=False,
        )
        if keep is None and not self.folder.is_dir():
            raise UserError(f'{self.folder}: no checkpoint here; run --mode train first')
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Writes a checkpoint; one of the same step is left as it is."""
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            ),
        )

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, Progress]:
        """Returns (state, progress) of a checkpoint, the last by default.

        Args:
          like: shapes, dtypes and where the arrays go (Run.abstract_state).
          step: which checkpoint.

        Raises:
          UserError: there is no such checkpoint, or its arrays are not those of this config.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f'{self.folder}: no checkpoint here; run --mode train first')
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(
                f'--step: there is no checkpoint of step {step} in {self.folder}; '
                f'there are {", ".join(map(str, steps))}'
            )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f'{self.folder / str(step)}: this checkpoint cannot be restored ({reason}); '
                'delete it to continue from the one before, or take another --workdir'
            ) from error
        return restored.state, Progress(**restored.progress)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()
