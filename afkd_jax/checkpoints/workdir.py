"""The workdir: which run it holds, and whether that run has begun or finished."""

import contextlib
import enum
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from afkd_jax import config as config_lib
from afkd_jax import studies
from afkd_jax.checkpoints.files import write_json
from afkd_jax.checkpoints.lock import held, locked
from afkd_jax.config import Config
from afkd_jax.errors import UserError


def finished_summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run; None if the run is not finished.

    An unreadable summary counts as none: it is written anew from the last checkpoint.
    """
    try:
        result = json.loads((workdir / 'summary.json').read_text(), parse_constant=int)  # no NaN
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get('finished') is True else None


class State(enum.Enum):
    """Where a run stands."""

    DONE = 'done'
    RUNNING = 'running'
    STOPPED = 'stopped'
    WAITING = 'waiting'
    FAILED = 'failed'


FAILED = 'failed.json'  # written where a run of a study has failed


def state_of(workdir: pathlib.Path, since: float = 0.0) -> State:
    """Returns the state of a run.

    Args:
      workdir: of the run; need not exist.
      since: failures before this time do not count.
    """
    if finished_summary(workdir):
        return State.DONE
    if held(workdir):
        return State.RUNNING
    failed = workdir / FAILED
    if failed.exists() and failed.stat().st_mtime >= since:
        return State.FAILED
    return State.STOPPED if (workdir / 'checkpoints').is_dir() else State.WAITING


def check(workdir: pathlib.Path, config: Config, extend: bool = False) -> None:
    """Rejects a workdir that is no directory or holds another run; writes nothing.

    Fields on which no bit of the run depends may differ (config.run_fields), and with `extend`
    config.epochs may be larger.
    """
    path = workdir / 'config.json'
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f'--workdir: {workdir} is a file; name a directory')
    try:
        theirs = json.loads(path.read_text())
        if not isinstance(theirs, dict):
            raise ValueError('it is not an object')
    except (FileNotFoundError, NotADirectoryError):
        if (workdir / studies.NAME).exists():
            raise UserError(
                f'--workdir: {workdir} holds a study; name another directory, or add --mode study'
            ) from None
        return  # new; or its checkpoints, which contain their config, will be compared
    except (OSError, ValueError) as error:
        raise UserError(
            f'--workdir: {path} cannot be read ({error}); delete it to use the configs in the '
            'checkpoints, or name another directory'
        ) from None
    old, new = config_lib.run_fields(theirs), config_lib.run_fields(config)
    longer = config_lib.extended(old, new)
    different = config_lib.differences(longer if extend else old, new)
    if different:
        raise UserError(
            f'--workdir: {workdir} holds a run with another config ({"; ".join(different)}); '
            'name another directory, or use the old config to continue that run'
            + (', or add --extend to train it longer' if longer == new else '')
        )


def moved(workdir: pathlib.Path, config: Config) -> str | None:
    """Returns a line about another directory of the images than before; None: it is the same."""
    try:
        before = json.loads((workdir / 'config.json').read_text())['dataset']
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if before == config.dataset:
        return None
    return f'{workdir}: the images are those of {config.dataset}, which before were in {before}'


def check_shared(workdir: pathlib.Path) -> None:
    """Rejects a workdir that this process does not see, after the primary has made it."""
    if not (workdir / 'config.json').exists():
        raise UserError(
            f'--workdir: {workdir.absolute()} is not seen by every process; name a directory on a '
            'file system that all of them share'
        )


def check_begun(workdir: pathlib.Path) -> None:
    """Rejects a workdir in which no run has begun."""
    if not (workdir / 'checkpoints').is_dir():
        raise UserError(f'--workdir: {workdir} holds no run; train first, with --mode train')


def write_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes config.json."""
    write_json(workdir / 'config.json', config.to_dict())


@contextlib.contextmanager
def claimed(
    workdir: pathlib.Path, config: Config, log: Callable[[str], None], extend: bool = False
) -> Iterator[Callable[[], None]]:
    """Makes and locks the workdir, and writes a new run's config.json; yields lock.locked's check.

    A config.json that is there stays, until the images and checkpoints are known to be the run's.

    Raises:
      UserError: the workdir cannot be made, holds another run, or another process works in it.
    """
    with locked(workdir, log) as check_held:
        check(workdir, config, extend)  # again: only now can no other process change it
        if not (workdir / 'config.json').exists():
            write_config(workdir, config)
        yield check_held
