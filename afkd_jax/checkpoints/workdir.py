"""The workdir: whose run it holds, who writes in it now, and how its files are written and kept."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import filelock
from ml_collections import ConfigDict

from afkd_jax import config as config_lib
from afkd_jax.errors import UserError

# After so long without a sign of life the process that holds a workdir counts as gone, where that
# cannot be seen at once: on another machine.
LEASE_S = 30.0


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes the file whole or not at all, also when the machine loses its power."""
    temporary = path.with_name(path.name + '.tmp')
    with temporary.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file whole or not at all, as JSON for a reader."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + '\n').encode())


def set_aside(workdir: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Moves what the run cannot use any more, but nobody may lose, to workdir/set_aside."""
    target = workdir / 'set_aside' / path.relative_to(workdir)
    target.parent.mkdir(parents=True, exist_ok=True)
    free, count = target, 1
    while free.exists():
        count += 1
        free = target.with_name(f'{target.name}.{count}')
    path.rename(free)
    return free


def summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run; None if the run is not finished.

    A summary that cannot be read counts as none: it is made anew from the last checkpoint.
    """
    try:
        result = json.loads((workdir / 'summary.json').read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get('finished') is True else None


def check(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Refuses a workdir that is no directory or holds another run; writes nothing.

    A run may go on with other checkpoints.*, on_nonfinite and the like (config.of_the_run).
    """
    path = workdir / 'config.json'
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir: {workdir} is a file; name a directory')
    try:
        theirs = json.loads(path.read_text())
        if not isinstance(theirs, dict):
            raise ValueError('it is not an object')
    except (FileNotFoundError, NotADirectoryError):
        return  # new; or its checkpoints, which know their config, will be compared
    except (OSError, ValueError) as error:
        raise UserError(
            f'--workdir: {path} cannot be read ({error}); delete it to go by the configs that are '
            'kept in the checkpoints, or name another directory'
        ) from None
    different = config_lib.differences(config_lib.of_the_run(theirs), config_lib.of_the_run(config))
    if different:
        raise UserError(
            f'--workdir: {workdir} holds a run with another config ({"; ".join(different)}); '
            'name another directory, or use the old config to continue that run'
        )


def check_shared(workdir: pathlib.Path) -> None:
    """Refuses a workdir that this process does not see, after process 0 has made it."""
    if not (workdir / 'config.json').exists():
        raise UserError(
            f'--workdir: {workdir.absolute()} is not seen by every process; name a directory on a '
            'file system that all of them share'
        )


def check_begun(workdir: pathlib.Path) -> None:
    """Refuses a workdir in which no run has begun."""
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(f'--workdir: {workdir} holds no run; train first, with --mode train')


@contextlib.contextmanager
def claimed(
    workdir: pathlib.Path, config: ConfigDict, tell: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Makes the workdir, holds its lock and writes config.json; the lock ends with the context.

    The lock (workdir/lock) names its owner's process and machine. That of a process that is gone
    is taken over: at once on this machine; from another one after LEASE_S without a sign of life.

    Args:
      workdir: of the run.
      config: of the run.
      tell: is given a line for the user where there is something to wait for.

    Yields:
      a function that raises a UserError if the lock was lost in the meantime.

    Raises:
      UserError: the workdir cannot be made or holds another run, or a process works in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = _locked(workdir, tell)
    except OSError as error:
        raise UserError(
            f'--workdir: {workdir} cannot be used ({error.strerror or error}); '
            'name a directory that can be written'
        ) from None

    def check_held() -> None:
        if lock.compromise:
            raise UserError(
                f'--workdir: {workdir} was taken by another process, or its lock was deleted '
                f'({lock.compromise.reason}); this process ends, the checkpoints are intact'
            )

    try:
        check(workdir, config)  # again: only now can nobody else change it
        write_json(workdir / 'config.json', config.to_dict())
        yield check_held
    finally:
        with contextlib.suppress(OSError):  # e.g. of a disk that is gone
            lock.release()


def _our_host() -> str:
    """Returns what a lock of ours has for this machine, or for this container of it."""
    with tempfile.TemporaryDirectory() as folder, filelock.SoftFileLease(f'{folder}/lock') as lock:
        return lock.owner.hostname


def _locked(workdir: pathlib.Path, tell: Callable[[str], None]) -> filelock.SoftFileLease:
    lock = filelock.SoftFileLease(
        workdir / 'lock', lease_duration=LEASE_S, timeout=0, thread_local=False
    )
    owner = lock.owner
    who = f'process {owner.pid} on {owner.hostname}' if owner else 'another process'
    try:
        try:
            lock.acquire()
        except filelock.Timeout:
            if owner and owner.hostname == _our_host():
                raise
            tell(f'{workdir}: locked by {who}; waiting {LEASE_S:.0f} s for a sign of life')
            lock.acquire(timeout=1.2 * LEASE_S)
    except (filelock.Timeout, filelock.LeaseSettingsMismatch):
        raise UserError(
            f'--workdir: {workdir} is in use by {who}; wait for its end, or name another directory '
            f'(if that process is certainly gone, delete {lock.lock_file})'
        ) from None
    if owner:
        tell(f'{workdir}: took over the lock of {who}, which is gone')
    return lock
