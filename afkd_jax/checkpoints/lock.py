"""The lock of a workdir: one process at a time trains in it."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import filelock

from afkd_jax.errors import UserError


class LockedError(UserError):
    """Another process works in the workdir."""


# Without a sign of life for so long, a process on another machine counts as gone.
LEASE_S = 30.0


@contextlib.contextmanager
def locked(workdir: pathlib.Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Makes the workdir and holds its lock (workdir/lock), which names process and machine.

    The lock of a process that is gone is taken over: at once on this machine; from another machine
    after LEASE_S without a sign of life.

    Args:
      workdir: of the run.
      log: takes a line for the user where there is something to wait for.

    Yields:
      a function that raises a UserError if the lock was lost in the meantime.

    Raises:
      UserError: the workdir cannot be made or written, or another process works in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = _acquire(workdir, log)
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
        yield check_held
    finally:
        with contextlib.suppress(OSError):  # e.g. a disk that has gone
            lock.release()


def held(workdir: pathlib.Path) -> bool:
    """Returns whether a process works in the workdir, by the age of its last sign of life.

    The lock of a process that is gone counts for up to LEASE_S.
    """
    try:
        touched = (workdir / 'lock').stat().st_mtime
        with tempfile.NamedTemporaryFile(dir=workdir) as file:  # the file server's clock
            return os.stat(file.name).st_mtime - touched < LEASE_S
    except OSError:
        return False


def _own_hostname() -> str:
    """Returns the machine's name (or the container's) as a lock of this process has it."""
    with tempfile.TemporaryDirectory() as folder, filelock.SoftFileLease(f'{folder}/lock') as lock:
        assert lock.owner
        return lock.owner.hostname


def _acquire(workdir: pathlib.Path, log: Callable[[str], None]) -> filelock.SoftFileLease:
    lock = filelock.SoftFileLease(
        workdir / 'lock', lease_duration=LEASE_S, timeout=0, thread_local=False
    )
    owner = lock.owner
    who = f'process {owner.pid} on {owner.hostname}' if owner else 'another process'
    try:
        try:
            lock.acquire()
        except filelock.Timeout:
            if owner and owner.hostname == _own_hostname():
                raise
            log(f'{workdir}: locked by {who}; waiting {LEASE_S:.0f} s for a sign of life')
            lock.acquire(timeout=1.2 * LEASE_S)
    except (filelock.Timeout, filelock.LeaseSettingsMismatch):
        raise LockedError(
            f'--workdir: {workdir} is in use by {who}; wait for its end, or name another directory '
            f'(if that process is certainly gone, delete {lock.lock_file})'
        ) from None
    if owner:
        log(f'{workdir}: took over the lock of {who}, which is gone')
    return lock
