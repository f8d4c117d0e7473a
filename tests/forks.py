"""launch.py in forks of one process that has imported everything: seconds that are paid once."""

import contextlib
import multiprocessing
import os
import pathlib
import runpy
import shutil
import signal
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT_S = 200  # a command that takes longer hangs
# XLA compiles three times sooner, to programs that are slower: tests compile much, compute little.
UNOPTIMISED = (
    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
    '--xla_cpu_parallel_codegen_split_count=1'
)

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(
    [
        'afkd_jax.data.sources.tfds',
        'afkd_jax.tools.describe',
        'afkd_jax.training.loop',
        'sklearn.datasets',
    ]
)


def environment(devices=1):
    """Returns that of a process with so many CPU devices."""
    flags = f'--xla_force_host_platform_device_count={devices} {UNOPTIMISED}'
    return os.environ | {'XLA_FLAGS': flags}


def _run(arguments, variables, files, timeout, unread):
    """Is launch.py, in the fork."""
    signal.alarm(timeout)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    if unread:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    # Anew, because the old ones remember whether what they wrote to could be seeked.
    sys.stdout = os.fdopen(1, 'w', closefd=False)
    sys.stderr = os.fdopen(2, 'w', 1, closefd=False)
    sys.argv, code = ['launch.py', *arguments], 99
    try:
        runpy.run_path('launch.py', run_name='__main__')
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 120  # as the interpreter
    sys.stderr.flush()
    os._exit(code)


class Launch:
    """launch.py as a process.

    Args:
      arguments: of the command line.
      variables: of the environment; None for environment().
      timeout: in seconds, after which it ends by SIGALRM.
      unread: nobody reads its output, as after `| head`.
    """

    def __init__(self, arguments, variables=None, timeout=TIMEOUT_S, unread=False):
        self._folder = pathlib.Path(tempfile.mkdtemp())
        self._files = [self._folder / 'output', self._folder / 'errors']
        for file in self._files:
            file.touch()
        variables = environment() if variables is None else variables
        arguments = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(
            target=_run, args=(arguments, variables, self._files, timeout, unread)
        )
        self._process.start()

    def poll(self):
        """Returns the exit code, minus a signal's number if one ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number):
        """Does nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def end(self):
        """Returns [exit code, output, errors] once it has ended."""
        self._process.join()
        texts = [file.read_text() for file in self._files]
        shutil.rmtree(self._folder)
        return [self._process.exitcode, *texts]


def run(arguments, variables=None):
    """Returns [exit code, output, errors] of launch.py."""
    return Launch(arguments, environment() | (variables or {}), timeout=60).end()
