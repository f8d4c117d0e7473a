"""Signals: the first requests a stop, the second ends the process, also inside the compiler."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import EXIT_KILLED

# The main thread sleeps inside one call of C, as it does inside the compiler.
PROGRAM = """
import ctypes, sys
from afkd_jax.devices.signals import Interrupt
libc = ctypes.CDLL(None)
with Interrupt() as interrupt:
    print('ready', flush=True)
    for _ in range({naps}):
        libc.usleep(200_000)
    print('requested' if interrupt.requested else 'not requested')
"""


# Another thread says that it is ready, when the main thread is inside the call.
CANCEL = """
import hashlib, threading
from afkd_jax.devices.signals import Cancel
with Cancel():
    try:
        threading.Timer(0.3, print, ['ready'], dict(flush=True)).start()
        {call}
    except KeyboardInterrupt:
        print('interrupted')
"""


def start(program, stderr=subprocess.PIPE):
    process = subprocess.Popen(
        [sys.executable, '-c', program],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert process.stdout.readline() == 'ready\n'
    return process


def run(numbers, naps=100, stderr=subprocess.PIPE):
    process = start(PROGRAM.format(naps=naps), stderr)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize('number', Interrupt.SIGNALS)
def test_the_first_signal_requests_a_stop(number):
    code, output, errors = run([number], naps=3)
    assert (code, output) == (0, 'requested\n')
    name = signal.Signals(number).name
    assert errors == f'{name}: stops before the first step; once more ends at once\n'


@pytest.mark.parametrize('numbers', [(signal.SIGINT,) * 2, (signal.SIGTERM, signal.SIGINT)])
def test_the_second_signal_ends_the_process_at_once(numbers):
    code, output, errors = run(numbers)
    assert (code, output) == (EXIT_KILLED, '')
    assert errors.splitlines()[1] == 'error: interrupted; what was written before is intact'


def test_ctrl_c_inside_a_long_call_is_announced_and_the_second_ends_at_once():
    process = start(CANCEL.format(call="hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"))
    process.send_signal(signal.SIGINT)
    expected = 'SIGINT: ends after the compilation, or another call that cannot be interrupted; '
    assert process.stderr.readline() == f'{expected}once more ends at once\n'
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (EXIT_KILLED, '')
    assert errors == 'error: interrupted; what was written before is intact\n'


def test_ctrl_c_elsewhere_is_not_announced():
    process = start(CANCEL.format(call='import time; time.sleep(60)'))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ('interrupted\n', '')


def test_a_scheduler_that_terminates_process_and_group_counts_once():
    code, output, errors = run([signal.SIGTERM] * 2, naps=3)
    assert (code, output) == (0, 'requested\n')
    assert errors.count('\n') == 1


def test_the_process_ends_also_where_nobody_reads_its_messages():
    read, write = os.pipe()
    os.close(read)
    try:
        assert run([signal.SIGINT] * 2, stderr=write)[0] == EXIT_KILLED
    finally:
        os.close(write)


def test_other_signals_are_not_counted():
    with Interrupt() as interrupt:
        previous = signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.raise_signal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, previous)
        assert not interrupt.requested


def test_handlers_threads_and_files_are_restored():
    handlers = [signal.getsignal(number) for number in Interrupt.SIGNALS]
    threads, files = threading.active_count(), len(os.listdir('/proc/self/fd'))
    for _ in range(2):
        with Interrupt() as interrupt:
            assert [signal.getsignal(number) for number in Interrupt.SIGNALS] != handlers
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.requested
    assert [signal.getsignal(number) for number in Interrupt.SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert (threading.active_count(), len(os.listdir('/proc/self/fd'))) == (threads, files)


def test_outside_the_main_thread_nothing_is_caught():
    seen = []

    def body():
        with Interrupt() as interrupt:
            seen.append((signal.getsignal(signal.SIGTERM), interrupt.requested))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(signal.getsignal(signal.SIGTERM), False)]
