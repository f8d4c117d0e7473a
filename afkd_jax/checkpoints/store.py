"""Checkpoints: arrays (Orbax) and a record (record.py) in directories that appear atomically.

The record holds the run's progress, its origin (config, images and the names, dtypes and shapes of
its arrays), versions and checksums. So a checkpoint that is cut, altered, incomplete or another
run's is detected before any of its files is interpreted.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import inspect
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from afkd_jax import config as config_lib
from afkd_jax.checkpoints import record
from afkd_jax.checkpoints.progress import Progress
from afkd_jax.devices import arrays as arrays_lib
from afkd_jax.devices import processes
from afkd_jax.errors import UserError, first_line
from afkd_jax.method import state as state_lib
from afkd_jax.method.metrics import Sums
from afkd_jax.method.state import State

# <step>, or <step>.<n> where a later checkpoint replaces one of the same step.
_NAME = re.compile(r'\d+(\.\d+)?')
_UNFINISHED = '.unfinished'  # being written, or being deleted
_SAVING = 'save'  # tag of what processes exchange from the thread that writes


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run at one step: all that is needed to continue as if it had never stopped.

    Attributes:
      sums: of the values since the last log line.
    """

    state: State
    sums: Sums
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Restored:
    """A snapshot that was read.

    Attributes:
      metadata: 'versions' and 'devices' that wrote it.
      epochs: config.epochs of the run that wrote it; fewer than now if it was extended.
      rejected: directory -> why it was not used, of newer ones that should have been.
      newer: the other directories that are newer.
    """

    snapshot: Snapshot
    metadata: dict[str, Any]
    epochs: int
    rejected: dict[pathlib.Path, str]
    newer: list[pathlib.Path]


def _order(path: pathlib.Path) -> tuple[int, int]:
    """Returns (step, n) of a checkpoint's directory, n = 1 for the first of its step."""
    step, _, n = path.name.partition('.')
    return int(step), int(n or 1)


def step_of(path: pathlib.Path) -> int:
    """Returns the step of a checkpoint's directory."""
    return _order(path)[0]


def checkpoint_paths(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the directories of a run's checkpoints, the oldest first."""
    folder = workdir.absolute() / 'checkpoints'
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_order)


def check_content(path: pathlib.Path, content: dict[str, Any], found: Any, expected: Any) -> None:
    """Rejects a record of another step, run or version.

    Fewer config.epochs are no other run: it was extended (--extend).

    Args:
      path: of the checkpoint.
      content: of its record.
      found: the record's origin, or a part of it.
      expected: the run's, as JSON has it.

    Raises:
      Unusable: it is.
    """
    if content['step'] != step_of(path):
        raise record.Unusable(f'is that of step {content["step"]}')
    config = config_lib.run_fields(found.get('config', {}))  # an older version wrote more of them
    config = config_lib.extended(config, expected['config'])
    different = config_lib.differences(
        config_lib.flatten({**found, 'config': config}), config_lib.flatten(expected)
    )
    if different:
        more = f' and {len(different) - 4} more' if len(different) > 4 else ''
        raise record.Unusable(f'is of another run ({"; ".join(different[:4])}{more})')
    try:
        Progress.from_json(content['progress'])
    except (TypeError, KeyError) as error:
        raise _other_version(error) from error


class Checkpoints:
    """The checkpoints of one workdir.

    A thread writes them, one at a time, while training continues. Every process writes its shards,
    the primary the rest. Networks with the same structure are stored stacked, so that the files do
    not depend on the mesh. The last `keep` are kept, and each network's and the ensemble's best
    epoch on validation.

    Args:
      workdir: they are in its folder `checkpoints`.
      origin: what defines the run (Run.origin).
      metadata: 'versions' and 'devices', for the record.
      keep: None to read only.
      check_held: raises if the workdir's lock was lost.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        origin: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        keep: int | None = None,
        check_held: Callable[[], None] = lambda: None,
    ):
        self.folder = workdir.absolute() / 'checkpoints'
        self._origin = json.loads(json.dumps(origin))  # as it will be read
        self._metadata, self._keep, self._check_held = metadata or {}, keep, check_held
        # With active_processes Orbax synchronises by the key-value store; by default it sums over
        # the devices, which from this thread would interleave with the steps' collectives.
        processes_option = ocp.options.MultiprocessingOptions(
            active_processes=set(range(processes.count())) if processes.count() > 1 else None
        )
        self._orbax = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=processes_option),
            multiprocessing_options=processes_option,
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoints')
        self._writing: concurrent.futures.Future | None = None
        # The next step reuses the state's memory, so a copy is made on the devices.
        self._copy = jax.jit(lambda arrays: jax.tree.map(jnp.copy, _stored(arrays)))
        if keep is not None and processes.is_primary():
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.iterdir():  # left by a killed process
                if path.name.endswith(_UNFINISHED):
                    shutil.rmtree(path)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # else the first error is the one to report
                raise
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def paths(self) -> list[pathlib.Path]:
        """Returns the directories of the checkpoints, the oldest first."""
        return checkpoint_paths(self.folder.parent)

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint, after the one before is written.

        Args:
          step: of the snapshot.
          snapshot: its arrays may be donated afterwards.

        Raises:
          UserError: the one before could not be written.
        """
        self.wait()
        arrays = self._copy((snapshot.state, snapshot.sums))
        content = {
            'step': step,
            'progress': snapshot.progress.to_json(),
            'origin': self._origin,
            **self._metadata,
        }
        best = snapshot.progress.best_steps()
        self._writing = self._thread.submit(self._write, step, arrays, content, best)

    def wait(self) -> None:
        """Waits for the checkpoint being written, and raises its error."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def poll(self) -> None:
        """Raises the error of the checkpoint being written, if it has failed by now."""
        if self._writing and self._writing.done():
            self.wait()

    def _write(self, step: int, arrays: Any, content: dict[str, Any], best: set[int]) -> None:
        raise_on_all = functools.partial(processes.raise_on_all, tag=_SAVING)
        state, sums = arrays
        parts = state.local_parts()
        raise_on_all(lambda: _reject_nonfinite(step, parts))
        content['digests'] = _merged(processes.all_gather(_digests(parts, sums), _SAVING))
        same = [_order(path) for path in self.paths() if step_of(path) == step]
        name = processes.broadcast(f'{step}.{same[-1][1] + 1}' if same else str(step), _SAVING)
        path = self.folder / name
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            _check_disk_space(self.folder, arrays)
            self._orbax.save(unfinished / 'arrays', args=ocp.args.StandardSave(_pruned(arrays)))
            if processes.is_primary():
                record.write(unfinished, content)
        except Exception as error:  # Orbax and TensorStore raise whatever their drivers raise
            shutil.rmtree(unfinished, ignore_errors=True)
            disk = re.search(r'([^:]+) \[os_error_code', str(error))
            why = disk[1].strip() if disk else first_line(error)
            raise UserError(
                f'{path}: the checkpoint cannot be written ({why}); those before it are intact: '
                'make room, or mend the disk, then the same command continues'
            ) from error
        self._check_held()
        if processes.is_primary():
            unfinished.rename(path)
            self._remove_old(best)
        raise_on_all(lambda: None)  # from here on all processes see the same checkpoints

    def _remove_old(self, best: set[int]) -> None:
        """Deletes what need not be kept; each is renamed first, so that none is left in pieces."""
        assert self._keep
        last = {step_of(path): path for path in self.paths()}  # of two of one step the later
        kept = {last[step] for step in [*sorted(last)[-self._keep :], *(best & last.keys())]}
        for path in self.paths():
            if path not in kept:
                removed = path.with_name(path.name + _UNFINISHED)
                path.rename(removed)
                shutil.rmtree(removed)

    def restore(self, abstract: tuple[State, Sums], step: int | None = None) -> Restored | None:
        """Returns the newest whole checkpoint of this run; None if there is no checkpoint.

        Args:
          abstract: shapes, dtypes and shardings of state and sums.
          step: of the checkpoint; None for the newest.

        Raises:
          UserError: there are checkpoints, but none that can be used.
        """
        names = processes.broadcast([path.name for path in self.paths()])
        paths = [self.folder / name for name in reversed(names)]
        wanted = [path for path in paths if step in (None, step_of(path))]
        if step is not None and not wanted:
            known = ', '.join(str(step) for step in sorted(set(map(step_of, paths)))) or 'none'
            raise UserError(
                f'--step: there is no checkpoint of step {step} in {self.folder}; there are {known}'
            )
        rejected: dict[pathlib.Path, str] = {}
        for path in wanted:
            try:
                snapshot, content = self._read(path, abstract)
            except record.Unusable as error:
                rejected[path] = str(error)
                continue
            newer = [other for other in paths[: paths.index(path)] if other not in rejected]
            metadata = {name: content[name] for name in ('versions', 'devices')}
            epochs = content['origin']['config']['epochs']
            return Restored(snapshot, metadata, epochs, rejected, newer)
        if rejected:
            reasons = '; '.join(f'{path.name} {why}' for path, why in rejected.items())
            raise UserError(
                f'{self.folder}: no checkpoint can be used: {reasons}. Put back a whole one of '
                'this run, or name another --workdir to start anew'
            )
        return None

    def _read(
        self, path: pathlib.Path, abstract: tuple[State, Sums]
    ) -> tuple[Snapshot, dict[str, Any]]:
        # The primary checks the files; then all read the arrays.
        content = _unusable_on_all(lambda: self._content(path) if processes.is_primary() else None)
        content = processes.broadcast(content)
        state, sums = _unusable_on_all(lambda: self._arrays(path, abstract, content['digests']))
        snapshot = Snapshot(state, sums, Progress.from_json(content['progress']))
        return snapshot, content

    def _content(self, path: pathlib.Path) -> dict[str, Any]:
        """Returns the record of a checkpoint whose files are whole and of this run."""
        content = record.read(path)
        check_content(path, content, content['origin'], self._origin)
        return content

    def _arrays(
        self, path: pathlib.Path, abstract: tuple[State, Sums], digests: dict[str, str]
    ) -> tuple[State, Sums]:
        """Returns the arrays of a checkpoint whose files are whole."""
        wanted: Any = jax.eval_shape(_stored, abstract)
        restack = type(wanted[0]) is not type(abstract[0])
        sharding = abstract[0].step.sharding  # replicated, as all of the step's state is
        wanted = (
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), wanted
            )
            if restack
            else abstract
        )
        try:
            found = self._orbax.restore(
                path / 'arrays', args=ocp.args.StandardRestore(_pruned(wanted))
            )
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            # The files are whole, so another version wrote them.
            raise _other_version(error) from error
        state, sums = _restored(wanted, found)
        found = _digests(state.local_parts(), sums)
        if any(digests.get(name) != digest for name, digest in found.items()):
            raise record.Unusable('is read as other arrays than were written, by this version')
        return (jax.jit(lambda state: state.unstack())(state) if restack else state), sums


def _stored(arrays: tuple[State, Sums]) -> tuple[State, Sums]:
    """Returns the arrays in the structure in which they are stored."""
    state, sums = arrays
    return (state.stack() if state.stackable else state), sums


def _pruned(arrays: Any) -> Any:
    """Returns the arrays, with dataclasses as dicts without optional fields that hold no array.

    So a checkpoint from before such a field was added can be read.
    """
    if type(arrays) is tuple:
        return tuple(map(_pruned, arrays))
    if not dataclasses.is_dataclass(arrays):
        return arrays
    fields = {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays)}
    given = inspect.signature(type(arrays)).parameters
    return {
        name: _pruned(value)
        for name, value in fields.items()
        if given[name].default is inspect.Parameter.empty or jax.tree.leaves(value)
    }


def _restored(wanted: tuple[State, Sums], found: Any) -> tuple[State, Sums]:
    """Returns the arrays that were found, as dicts, in the structure that is wanted."""

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator='/')

    leaves = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name(path)], wanted)


def _digests(parts: dict[int | str, Any], sums: Sums) -> dict[str, str]:
    return state_lib.digests(parts) | {'sums': arrays_lib.fingerprint(sums)}


def _unusable_on_all(function: Callable[[], Any]) -> Any:
    """Returns function(), once it has returned in every process.

    Raises:
      Unusable: it was raised in one process, so it is raised in all.
    """
    result, why = None, None
    try:
        result = function()
    except record.Unusable as error:
        why = str(error)
    reasons = [reason for reason in processes.all_gather(why) if reason]
    if reasons:
        raise record.Unusable(reasons[0])
    return result


def _other_version(error: Exception) -> record.Unusable:
    return record.Unusable(f'cannot be read by this version ({first_line(error)})')


def _merged(parts: list[dict[str, str]]) -> dict[str, str]:
    return {name: value for part in parts for name, value in sorted(part.items())}


def _check_disk_space(folder: pathlib.Path, arrays: Any) -> None:
    """Raises an OSError if the disk has no room for a checkpoint, before one is begun."""
    # Arrays hardly compress; the record and Orbax's metadata of each array are added.
    needed = 2**20 + 1.1 * arrays_lib.byte_count(arrays)
    free = shutil.disk_usage(folder).free
    if free < needed:
        figures = f'about {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free'
        raise OSError(f'{os.strerror(errno.ENOSPC)}: {figures}')


def _reject_nonfinite(step: int, parts: dict[int | str, Any]) -> None:
    """Rejects a state that has overflowed although the step's values were still finite."""
    if name := state_lib.nonfinite(parts):
        raise UserError(
            f'step {step}: {name} holds numbers that are not finite; the run has diverged and is '
            'ended, its checkpoints are from before: '
            'lower config.logit.learning_rate, in a new --workdir'
        )
