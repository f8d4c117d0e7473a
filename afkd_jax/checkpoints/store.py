"""Checkpoints: the arrays (Orbax) and a record of what they are (record.py), in atomic directories.

The record holds the run's progress, what the run is (its config, images and the names, dtypes and
shapes of its arrays), the versions, and checksums. So a checkpoint that is cut, altered, incomplete
or another run's is told from one that is whole before any of its files is interpreted.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import record
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.devices import processes
from afkd_jax.errors import UserError
from afkd_jax.method import state as state_lib
from afkd_jax.method.metrics import Sums
from afkd_jax.method.state import TrainState

# <step>, or <step>.<n> where a checkpoint of that step was replaced by a later one.
_NAME = re.compile(r'\d+(\.\d+)?')
_UNFINISHED = '.unfinished'  # being written, or being deleted
_SAVING = 'save'  # what processes tell each other from the thread that writes


@dataclasses.dataclass(frozen=True)
class Point:
    """A run at one step: all that is needed to go on as if it had never stopped.

    Attributes:
      state: of the run.
      sums: of the values since the last log line.
      progress: what else must be remembered.
    """

    state: TrainState
    sums: Sums
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Restored:
    """A point that was read.

    Attributes:
      point: the run.
      about: what the checkpoint was written by: 'versions' and 'devices'.
      rejected: directory -> why it was not used, of the newer ones that should have been.
      newer: the other directories that are newer.
    """

    point: Point
    about: dict[str, Any]
    rejected: dict[pathlib.Path, str]
    newer: list[pathlib.Path]


def _order(path: pathlib.Path) -> tuple[int, int]:
    """Returns (step, n) of a checkpoint's directory, n = 1 for the first of its step."""
    step, _, n = path.name.partition('.')
    return int(step), int(n or 1)


def _step(path: pathlib.Path) -> int:
    return _order(path)[0]


class Checkpoints:
    """The checkpoints of one workdir.

    Written by a thread of their own, one at a time, while training goes on; the directory of one
    that is not complete has another name. Every process writes the arrays that it has, process 0
    the rest. Networks whose arrays are alike are stored stacked, so that what is on the disk does
    not depend on where they lived. Kept are the last `keep`, and for each network and the
    ensemble that of its best epoch on validation.

    Args:
      workdir: they lie in its folder `checkpoints`.
      origin: what makes the run (Run.origin).
      about: what goes into each record for the reader: 'versions', 'devices'.
      keep: None to read only.
      check_held: raises if the workdir is no longer ours to write in.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        origin: dict[str, Any],
        about: dict[str, Any] | None = None,
        keep: int | None = None,
        check_held: Callable[[], None] = lambda: None,
    ):
        self.folder = workdir.absolute() / 'checkpoints'
        self._origin = json.loads(json.dumps(origin))  # as it will come back
        self._about, self._keep, self._check_held = about, keep, check_held
        # So processes wait for each other by words; by default they do by a sum over their devices,
        # which from this thread would get between those of the steps.
        together = ocp.options.MultiprocessingOptions(
            active_processes=set(range(processes.count())) if processes.count() > 1 else None
        )
        self._orbax = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=together),
            multiprocessing_options=together,
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._writing: concurrent.futures.Future | None = None
        # The next step reuses the memory of the state; a copy on the devices is made at once.
        self._copy = jax.jit(lambda arrays: jax.tree.map(jnp.copy, _as_stored(arrays)))
        if keep is not None and processes.leads():
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.iterdir():  # what a killed process left half done
                if path.name.endswith(_UNFINISHED):
                    shutil.rmtree(path)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # else there is something more important to say
                raise
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def paths(self) -> list[pathlib.Path]:
        """Returns the directories of the checkpoints, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=_order)

    def save(self, step: int, point: Point) -> None:
        """Starts to write a checkpoint; waits only for the one before.

        Args:
          step: of the point.
          point: whose state and sums may be given away afterwards.

        Raises:
          UserError: the one before could not be written.
        """
        self.wait()
        arrays = self._copy((point.state, point.sums))
        content = {
            'step': step,
            'progress': dataclasses.asdict(point.progress),
            'origin': self._origin,
            **self._about,
        }
        self._writing = self._thread.submit(self._write, step, arrays, content)

    def wait(self) -> None:
        """Waits for what is being written, and raises what went wrong there."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def poll(self) -> None:
        """Raises what went wrong in writing, if that is known by now."""
        if self._writing and self._writing.done():
            self.wait()

    def _write(self, step: int, arrays: Any, content: dict[str, Any]) -> None:
        state, _ = arrays
        together = functools.partial(processes.together, tag=_SAVING)
        together(lambda: _refuse_nonfinite(step, state))
        content['digests'] = _merged(processes.share(state_lib.digests(state), _SAVING))
        same = [_order(path) for path in self.paths() if _step(path) == step]
        name = processes.told(f'{step}.{same[-1][1] + 1}' if same else str(step), _SAVING)
        path = self.folder / name
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            _check_room(self.folder, arrays)
            self._orbax.save(unfinished / 'arrays', args=ocp.args.StandardSave(arrays))
            if processes.leads():
                record.write(unfinished, content)
        except Exception as error:  # Orbax and TensorStore raise whatever their drivers raise
            shutil.rmtree(unfinished, ignore_errors=True)
            disk = re.search(r'([^:]+) \[os_error_code', str(error))
            why = disk[1].strip() if disk else record.first_words(error)
            raise UserError(
                f'{path}: the checkpoint cannot be written ({why}); those before it are intact: '
                'make room, or mend the disk, then the same command continues'
            ) from error
        self._check_held()
        if processes.leads():
            unfinished.rename(path)
            self._remove_old(Progress(**content['progress']).best_steps())
        together(lambda: None)  # now all see the same checkpoints

    def _remove_old(self, best: set[int]) -> None:
        """Deletes what need not be kept; each is renamed first, so that none is left in pieces."""
        last = {_step(path): path for path in self.paths()}  # of two of one step the later
        kept = {last[step] for step in [*sorted(last)[-self._keep :], *(best & last.keys())]}
        for path in self.paths():
            if path not in kept:
                removed = path.with_name(path.name + _UNFINISHED)
                path.rename(removed)
                shutil.rmtree(removed)

    def restore(self, like: tuple[TrainState, Sums], step: int | None = None) -> Restored | None:
        """Returns the newest checkpoint that is whole and this run's; None if there is none at all.

        Args:
          like: shapes, dtypes and where the arrays go.
          step: which checkpoint; None for the newest.

        Raises:
          UserError: there are checkpoints, but none that can be used.
        """
        paths = [self.folder / name for name in processes.told([p.name for p in self.paths()])][
            ::-1
        ]
        wanted = [path for path in paths if step in (None, _step(path))]
        if step is not None and not wanted:
            known = ', '.join(str(step) for step in sorted(set(map(_step, paths)))) or 'none'
            raise UserError(
                f'--step: there is no checkpoint of step {step} in {self.folder}; there are {known}'
            )
        rejected: dict[pathlib.Path, str] = {}
        for path in wanted:
            try:
                point, about = self._read(path, like)
            except record.Unfit as error:
                rejected[path] = str(error)
                continue
            newer = [other for other in paths[: paths.index(path)] if other not in rejected]
            return Restored(point, about, rejected, newer)
        if rejected:
            told = '; '.join(f'{path.name} {why}' for path, why in rejected.items())
            raise UserError(
                f'{self.folder}: no checkpoint can be used: {told}. Put back a whole one of this '
                'run, or name another --workdir to start anew'
            )
        return None

    def _read(
        self, path: pathlib.Path, like: tuple[TrainState, Sums]
    ) -> tuple[Point, dict[str, Any]]:
        # Process 0 looks at the files; then all read the arrays.
        content = _fit(lambda: self._content(path) if processes.leads() else None)
        content = processes.told(content)
        arrays = _fit(lambda: self._arrays(path, like, content['digests']))
        point = Point(*arrays, Progress(**content['progress']))
        return point, {name: content[name] for name in ('versions', 'devices')}

    def _content(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the record of a checkpoint whose files are whole and of this run."""
        content = record.read(path)
        if content['step'] != _step(path):
            raise record.Unfit(f'is that of step {content["step"]}')
        different = config_lib.differences(
            config_lib.flatten(content['origin']), config_lib.flatten(self._origin)
        )
        if different:
            more = f' and {len(different) - 4} more' if len(different) > 4 else ''
            raise record.Unfit(f'is of another run ({"; ".join(different[:4])}{more})')
        try:
            Progress(**content['progress'])
        except TypeError as error:
            raise _of_another_version(error) from error
        return content

    def _arrays(
        self, path: pathlib.Path, like: tuple[TrainState, Sums], digests: dict[str, str]
    ) -> tuple[TrainState, Sums]:
        """Returns the arrays of a checkpoint whose files are whole."""
        stored, stacks = like, _stacks(like[0])
        if stacks:  # they are, and will be, as whole on every device as the step is
            everywhere = like[0].step.sharding
            stored = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
                jax.eval_shape(_as_stored, like),
            )
        try:
            arrays = self._orbax.restore(path / 'arrays', args=ocp.args.StandardRestore(stored))
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            # Its files are whole, so another version wrote them.
            raise _of_another_version(error) from error
        found = state_lib.digests(arrays[0]).items()
        if any(digests[str(k)] != digest for k, digest in found):
            raise record.Unfit('is read as other arrays than were written, by this version')
        if stacks:
            arrays = jax.jit(state_lib.unstacked)(arrays[0]), arrays[1]
        return arrays


def _as_stored(arrays: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
    """Returns the arrays in the form in which they are on the disk."""
    state, sums = arrays
    return (state_lib.stacked(state) if _stacks(state) else state), sums


def _stacks(state: TrainState) -> bool:
    """Returns whether the networks of a state are stacked on the disk alone."""
    return isinstance(state.networks, tuple) and state_lib.alike(state)


def _fit(function: Callable[[], Any]) -> Any:
    """Returns what it returns, once it has in every process; raises Unfit if one of them does."""
    result, why = None, None
    try:
        result = function()
    except record.Unfit as error:
        why = str(error)
    reasons = [reason for reason in processes.share(why) if reason]
    if reasons:
        raise record.Unfit(reasons[0])
    return result


def _of_another_version(error: Exception) -> record.Unfit:
    return record.Unfit(f'cannot be read by this version ({record.first_words(error)})')


def _merged(parts: list[dict[str, str]]) -> dict[str, str]:
    return {name: value for part in parts for name, value in sorted(part.items())}


def _check_room(folder: pathlib.Path, arrays: Any) -> None:
    """Raises an OSError if the disk has no room for a checkpoint, before one is begun."""
    # Arrays hardly compress; beside them lie the record and what Orbax notes of each of them.
    needed = 2**20 + 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    free = shutil.disk_usage(folder).free
    if free < needed:
        figures = f'about {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free'
        raise OSError(f'{os.strerror(errno.ENOSPC)}: {figures}')


def _refuse_nonfinite(step: int, state: TrainState) -> None:
    """Refuses to keep a state that has run over, though the step's values were still finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        for shard in leaf.addressable_shards:
            if shard.replica_id:  # the same as another, perhaps in another process
                continue
            finite = np.isfinite(np.asarray(shard.data))
            if finite.all():
                continue
            name = path
            if not isinstance(state.networks, tuple):  # stacked
                first = shard.index[0].start or 0
                k = first + int(np.argmin(finite.reshape(len(finite), -1).all(1)))
                name = (path[0], jax.tree_util.SequenceKey(k), *path[1:])
            raise UserError(
                f'step {step}: {jax.tree_util.keystr(name)} holds numbers that are not finite; the '
                'run has diverged and is ended, its checkpoints are from before: '
                'lower config.logit.learning_rate, in a new --workdir'
            )
