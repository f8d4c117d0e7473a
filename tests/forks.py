"""launch.py in forks of one process that has imported everything: the 2 s are paid once."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT_S = 60  # a command that takes longer hangs

_SERVER = """
import json, os, runpy, signal, sys, tempfile, traceback
sys.path.insert(0, os.getcwd())
import afkd_jax.data.tfds_source, afkd_jax.describe, afkd_jax.train

for line in sys.stdin:
    arguments, environment, timeout = json.loads(line)
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    if not (child := os.fork()):
        signal.alarm(timeout)
        os.environ.update(environment)
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        sys.argv, code = ['launch.py', *arguments], 99
        try:
            runpy.run_path('launch.py', run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    print(json.dumps([code, *(file.read().decode() for file in files)]), flush=True)
"""


class Forks:
    """The process that forks."""

    def __init__(self):
        environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
        self._server = subprocess.Popen(
            [sys.executable, '-c', _SERVER],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments, environment=None):
        """Returns (exit code, output, errors); the code is -14 if it took longer than TIMEOUT_S."""
        line = json.dumps([arguments, environment or {}, TIMEOUT_S])
        self._server.stdin.write(line + '\n')
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self):
        self._server.communicate()
