"""Several processes that run one program, on JAX's distributed runtime.

Each process has its own devices; all share one mesh, one state and one workdir. Process 0 is the
primary: it alone writes, except that each process writes its shards of a checkpoint. What depends
on a clock, a signal or a file is decided once and broadcast, because a process that took another
branch would wait for the others for ever.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from afkd_jax import config as config_lib
from afkd_jax.errors import EXIT_RESUMABLE, EXIT_USER_ERROR, UserError

# A process without a sign of life for so long is lost, and the others end. Our choice.
LOST_AFTER_S = 20
_CONNECT_S = 300  # how far apart the processes may start; JAX's default
# How long the primary, whose runtime carries all messages, outlives its last message, and how long
# another process may take to end by itself before it is ended.
_GRACE_S = 3
LOST = (
    'another process of this run was lost, or the runtime failed; this one ends too, '
    'the checkpoints are intact: start all processes again, the same command continues'
)
UNREACHABLE = (
    '--coordinator_address: the other processes cannot be reached; start all of them, with one '
    'address that each can reach; to run alone: --coordinator_address=localhost:12345 '
    '--num_processes=1 --process_id=0'
)
Result = TypeVar('Result')
_counts: dict[str, int] = {}
_ended = threading.Event()


def _runtime() -> Any:
    """Returns JAX's state of the processes; its key-value store has no public name."""
    from jax._src import distributed

    return distributed.global_state


def count() -> int:
    """Returns the number of processes; touches no device."""
    return _runtime().num_processes


def index() -> int:
    """Returns this process's number, counted from 0."""
    return _runtime().process_id


def is_primary() -> bool:
    """Returns whether this process is the one that writes."""
    return index() == 0


def start(address: str | None, number: int | None, process: int | None) -> None:
    """Connects process `process`, in 0 .. number - 1, to the others, if there are any.

    `address` is HOST:PORT of process 0. Without arguments JAX detects TPU pods, Slurm and Open MPI.

    Raises:
      UserError: the arguments do not fit each other, or the others cannot be reached.
    """
    given = {'coordinator_address': address, 'num_processes': number, 'process_id': process}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f'--{missing[0]}: missing; --coordinator_address, --num_processes and --process_id are '
            'given together, or none of them where JAX knows the cluster'
        )
    if address is not None and number is not None and process is not None:
        if not 0 <= process < number:
            raise UserError(
                f'--process_id: must be in 0 .. {number - 1}, as --num_processes is {number}, but '
                f'is {process}'
            )
        _check_address(address, binds=process == 0)
    # JAX's own service would handle SIGTERM; ours ends the run after a step, with a checkpoint.
    jax.config.update('jax_enable_preemption_service', False)
    _on_abort(UNREACHABLE, EXIT_USER_ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # e.g. about a package that some clusters need
            jax.distributed.initialize(
                **given,
                initialization_timeout=_CONNECT_S,
                heartbeat_timeout_seconds=LOST_AFTER_S,
                shutdown_timeout_seconds=2 * LOST_AFTER_S,
                cluster_detection_method=None if missing else 'deactivate',
            )
    except ValueError as error:
        if missing and 'coordinator_address' in str(error):  # no cluster: this process is alone
            _on_abort(None)
            return
        raise UserError(f'--coordinator_address: {error}') from error
    except Exception as error:  # a cluster's interface, or the connection, raises anything
        raise UserError(f'{UNREACHABLE} ({" ".join(str(error).split())})') from error
    _on_abort(LOST, EXIT_RESUMABLE)
    threading.Thread(target=_listen, daemon=True).start()


def _check_address(address: str, binds: bool) -> None:
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f'--coordinator_address: must be HOST:PORT, as in 10.0.0.1:12345, but is {address}'
        )
    if binds:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(('', int(port)))
            except OSError as error:
                raise UserError(
                    f'--coordinator_address: port {port} of this machine cannot be used '
                    f'({error.strerror}); name another one, in all processes'
                ) from error


def _on_abort(message: str | None, code: int = 0) -> None:
    """Prints a message when JAX's runtime aborts the process; None removes the handler.

    The runtime aborts where another process is lost or unreachable, and calls nothing else before.
    """

    def aborted(_: int) -> None:
        os.write(2, f'error: {message}\n'.encode())
        os._exit(code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted if message else 0)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    _on_abort.__dict__['handler'] = handler  # must outlive the call


def _listen() -> None:
    """Ends this process when another one announces its end, unless it ends by itself."""
    while not _ended.is_set():
        try:
            announced = _runtime().client.blocking_key_value_get('ended', 1000)
        except Exception:  # no announcement yet; or the runtime fails, which it reports itself
            time.sleep(0.2)
            continue
        if not _ended.wait(_GRACE_S):
            end = json.loads(announced)
            named = '' if end['message'].startswith('process ') else f'process {end["process"]}: '
            os.write(2, f'error: {named}{end["message"]}\n'.encode())
            os._exit(end['code'])


def announce_end(message: str, code: int) -> None:
    """Announces to the other processes, if any, why this one ends, and its exit code."""
    if count() == 1 or _ended.is_set():
        return
    _ended.set()
    end = {'process': index(), 'message': message, 'code': code}
    with contextlib.suppress(Exception):  # another process was first, or none is left
        _runtime().client.key_value_set('ended', json.dumps(end))
    if is_primary():
        time.sleep(2 * _GRACE_S)


def shutdown() -> None:
    """Waits until all processes are done, and disconnects."""
    if _runtime().client is not None:
        _ended.set()
        jax.distributed.shutdown()
        _on_abort(None)


def all_gather(value: Any, tag: str = 'main') -> list[Any]:
    """Returns the value of every process, in their order, as JSON has it; waits for no device.

    Every process makes the calls of one tag in the same order. Each thread needs its own tag.
    """
    value = json.dumps(value)
    if count() == 1:
        return [json.loads(value)]
    _counts[tag] = _counts.get(tag, 0) + 1
    key = f'{tag}/{_counts[tag]}'
    _runtime().client.key_value_set(f'{key}/{index()}', value)
    return [json.loads(_get(f'{key}/{process}')) for process in range(count())]


def _get(key: str) -> str:
    while True:  # however long it takes: another process may be downloading a data set
        try:
            return _runtime().client.blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise


def broadcast(value: Any, tag: str = 'main') -> Any:
    """Returns the primary's value, as JSON has it."""
    return all_gather(value if is_primary() else None, tag)[0]


def raise_on_all(function: Callable[[], Result], tag: str = 'main') -> Result:
    """Returns function(), once it has returned in every process.

    Raises:
      UserError: it was raised in one process, so it is raised in all.
    """
    result, error = None, None
    try:
        result = function()
    except UserError as raised:
        error = raised
    messages = all_gather(error and str(error), tag)
    if error:
        raise error
    for process, message in enumerate(messages):
        if message:
            raise UserError(f'process {process}: {message}')
    return result  # pyright: ignore[reportReturnType] - no error, so it was assigned


def primary_first(function: Callable[[], Result]) -> Result:
    """Returns raise_on_all(function), called by the primary first.

    So the others find what it writes to a shared disk.
    """
    first = raise_on_all(function if is_primary() else lambda: None)
    rest = raise_on_all(function if not is_primary() else lambda: None)
    return first if is_primary() else rest  # pyright: ignore[reportReturnType]


def assert_equal(values: dict[str, Any]) -> None:
    """Raises UserError, in all processes, if values (by name) differ between processes."""
    first, *others = all_gather(values)
    for process, theirs in enumerate(others, start=1):
        if different := config_lib.differences(first, theirs):
            raise UserError(
                f'process {process}: it differs from process 0 ({"; ".join(different[:4])}); start '
                'all processes with the same command, code and data'
            )


class AnyProcess:
    """Whether any process has raised a flag, known to all at the same point of the program.

    Alone, a flag is known at once. Among several processes it is known one call later, so that
    none waits: it travels by the devices, beside the steps.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(
            lambda flags_NxF: flags_NxF.max(0), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._devices, self._before = mesh.size, None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Returns each flag's `any` over processes; every process makes the same calls."""
        if count() == 1:
            return flags
        flags_NxF = np.tile(np.array(flags, np.int32), (self._devices, 1))
        array = jax.make_array_from_callback(
            flags_NxF.shape, self._sharding, lambda index: flags_NxF[index]
        )
        before, self._before = self._before, self._any(array)
        if before is None:
            return (False,) * len(flags)
        return tuple(bool(flag) for flag in np.asarray(before))
