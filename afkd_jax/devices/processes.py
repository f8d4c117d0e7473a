"""Several processes that run one program together, on JAX's own distributed runtime.

Each has its own devices; together they have one mesh, one state and one workdir. Process 0 leads:
it alone writes, but for the others' shares of a checkpoint. What is decided by a clock, a signal or
a file is decided once and told to all: a process that went another way would never be met.
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
from afkd_jax.errors import UserError

# A process without a sign of life for so long is lost, and the others end. Our choice.
LOST_AFTER_S = 20
# So long the processes may be apart in starting; JAX's default.
_MEET_S = 300
# So long the process that leads, which carries the words of all, stays after its last, and another
# one may take to come to an end of its own before it is ended.
_FAREWELL_S = 3
LOST = (
    'another process of this run was lost, or the runtime failed; this one ends too, '
    'the checkpoints are intact: start all processes again, the same command continues'
)
UNMET = (
    '--coordinator_address: the other processes cannot be reached; start all of them, with one '
    'address that each can reach; to run alone: --coordinator_address=localhost:12345 '
    '--num_processes=1 --process_id=0'
)
Result = TypeVar('Result')
_counts: dict[str, int] = {}
_ended = threading.Event()


def _runtime() -> Any:
    """Returns what JAX knows of the processes; its key-value store has no public name."""
    from jax._src import distributed

    return distributed.global_state


def count() -> int:
    """Returns how many processes there are; no device is touched."""
    return _runtime().num_processes


def index() -> int:
    """Returns which of them this is."""
    return _runtime().process_id


def leads() -> bool:
    """Returns whether this process is the one that writes."""
    return index() == 0


def start(
    address: str | None, number: int | None, process: int | None, unmet: int, lost: int
) -> None:
    """Joins this process to the others; alone, where there are no others.

    Without arguments, environments that JAX knows are asked: TPU pods, Slurm, Open MPI.

    Args:
      address: HOST:PORT of process 0.
      number: of processes.
      process: which of them this is, in 0 .. number - 1.
      unmet: exit code of a process that ends because the others cannot be reached.
      lost: exit code of a process that ends because another one is lost.

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
    if not missing and not 0 <= process < number:
        raise UserError(
            f'--process_id: must be in 0 .. {number - 1}, as --num_processes is {number}, but is '
            f'{process}'
        )
    if not missing:
        _check_address(address, binds=process == 0)
    # It would take SIGTERM for itself; ours ends the run after a step, with a checkpoint.
    jax.config.update('jax_enable_preemption_service', False)
    _on_abort(UNMET, unmet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # e.g. of a package that some clusters would need
            jax.distributed.initialize(
                **given,
                initialization_timeout=_MEET_S,
                heartbeat_timeout_seconds=LOST_AFTER_S,
                shutdown_timeout_seconds=2 * LOST_AFTER_S,
                cluster_detection_method=None if missing else 'deactivate',
            )
    except ValueError as error:
        if missing and 'coordinator_address' in str(error):  # no cluster: this process is alone
            _on_abort(None)
            return
        raise UserError(f'--coordinator_address: {error}') from error
    except Exception as error:  # whatever a cluster's interface, or the connection, raises
        raise UserError(f'{UNMET} ({" ".join(str(error).split())})') from error
    _on_abort(LOST, lost)
    threading.Thread(target=_listen, daemon=True).start()


def _check_address(address: str, binds: bool) -> None:
    """Refuses what is no address, or, for the process that binds it, one that is in use."""
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


def _on_abort(words: str | None, code: int = 0) -> None:
    """Says a sentence when JAX's runtime aborts the process; None: says nothing any more.

    It aborts where another process is lost or cannot be met, and can be told to call nothing else
    instead. What it prints before stays.
    """

    def aborted(_: int) -> None:
        os.write(2, f'error: {words}\n'.encode())
        os._exit(code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted if words else 0)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    _on_abort.handler = handler  # must outlive the call


def _listen() -> None:
    """Ends this process when another one tells that it has ended, if it does not by itself."""
    while not _ended.is_set():
        try:
            words = _runtime().client.blocking_key_value_get('ended', 1000)
        except Exception:  # nobody has; or the runtime is going down, which it tells itself
            time.sleep(0.2)
            continue
        if not _ended.wait(_FAREWELL_S):
            told = json.loads(words)
            named = '' if told['words'].startswith('process ') else f'process {told["process"]}: '
            os.write(2, f'error: {named}{told["words"]}\n'.encode())
            os._exit(told['code'])


def end(words: str, code: int) -> None:
    """Tells the other processes why this one ends, with which code; does nothing if it is alone."""
    if count() == 1 or _ended.is_set():
        return
    _ended.set()
    told = {'process': index(), 'words': words, 'code': code}
    with contextlib.suppress(Exception):  # another one was first, or nobody is there any more
        _runtime().client.key_value_set('ended', json.dumps(told))
    if leads():
        time.sleep(2 * _FAREWELL_S)


def leave() -> None:
    """Waits until all processes are done, and parts from them."""
    if _runtime().client is not None:
        _ended.set()
        jax.distributed.shutdown()
        _on_abort(None)


def share(value: Any, tag: str = 'main') -> list[Any]:
    """Returns what each process has called this with, in their order; as JSON has it.

    Host memory only: nothing waits for a device.

    Args:
      value: of this process.
      tag: names a series of calls, one after the other, that every process makes alike; each
        thread has its own.
    """
    value = json.dumps(value)
    if count() == 1:
        return [json.loads(value)]
    _counts[tag] = _counts.get(tag, 0) + 1
    place = f'{tag}/{_counts[tag]}'
    client = _runtime().client
    client.key_value_set(f'{place}/{index()}', value)
    return [json.loads(_heard(client, f'{place}/{process}')) for process in range(count())]


def _heard(client: Any, key: str) -> str:
    """Returns what was told, however long that takes: a data set may be a long download away."""
    while True:
        try:
            return client.blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' not in str(error):
                raise


def told(value: Any, tag: str = 'main') -> Any:
    """Returns what process 0 has called this with; as JSON has it."""
    return share(value if leads() else None, tag)[0]


def together(function: Callable[[], Result], tag: str = 'main') -> Result:
    """Returns what the function returns in this process, once it has returned in all of them.

    Raises:
      UserError: it has in one of them, in which all end alike.
    """
    if count() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except UserError as raised:
        error = raised
    words = share(error and str(error), tag)
    if error:
        raise error
    for process, sentence in enumerate(words):
        if sentence:
            raise UserError(f'process {process}: {sentence}')
    return result


def in_turn(function: Callable[[], Result]) -> Result:
    """Returns what the function returns, once process 0 has called it, and then the others.

    So what it makes on a disk that they share it makes once.

    Raises:
      UserError: it has in one of them, in which all end alike.
    """
    first = together(function if leads() else lambda: None)
    if count() == 1:
        return first
    rest = together(function if not leads() else lambda: None)
    return first if leads() else rest


def same(values: dict[str, Any]) -> None:
    """Refuses to go on where processes have called this with different values.

    Args:
      values: name -> value, as JSON has it.

    Raises:
      UserError: in all processes alike.
    """
    first, *others = share(values)
    for process, theirs in enumerate(others, start=1):
        if different := config_lib.differences(first, theirs):
            raise UserError(
                f'process {process}: it differs from process 0 ({"; ".join(different[:4])}); start '
                'all processes with the same command, code and data'
            )


class Agreement:
    """What any process wishes, as all processes know it at the same point of the program.

    Alone, a wish is known at once. Among several it is known one call later, so that nobody waits:
    it travels by the devices, beside the steps.

    Args:
      mesh: of all devices.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(
            lambda wishes_NxW: wishes_NxW.max(0),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )
        self._devices, self._before = mesh.size, None

    def __call__(self, *wishes: bool) -> tuple[bool, ...]:
        """Returns, for each wish, whether a process has it; every process must call this alike."""
        if count() == 1:
            return wishes
        mine_NxW = np.tile(np.array(wishes, np.int32), (self._devices, 1))
        array = jax.make_array_from_callback(
            mine_NxW.shape, self._sharding, lambda index: mine_NxW[index]
        )
        before, self._before = self._before, self._any(array)
        if before is None:
            return (False,) * len(wishes)
        return tuple(bool(wish) for wish in np.asarray(before))
