"""Kills a run with SIGKILL at random moments, also while it saves, until it ends; counts.

python -m benchmarks.kills KILLS [SEED]

The run is a short one on the digits, with a checkpoint of every second step. It must always
continue, and end in the fingerprint of the same run without a kill. The last line is JSON.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
# kd_ring compiles in half the time of afd, which the demo runs.
RUN = [
    '--config=configs/digits.py',
    '--config.epochs=6',
    '--config.data.train_examples=284',
    '--config.log_every=2',
    '--config.method=kd_ring',
]
OFTEN = ['--config.checkpoint.every_steps=2', '--config.checkpoint.keep=2']


class Process:
    """launch.py as a process of its own; forks.Launch is the same, sooner."""

    def __init__(self, arguments, environment):
        self.popen = subprocess.Popen(
            [sys.executable, 'launch.py', *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.poll, self.send_signal = self.popen.poll, self.popen.send_signal

    def end(self):
        """Returns [exit code, output, errors] once it has ended."""
        output, errors = self.popen.communicate()
        return [self.popen.returncode, output, errors]


def arguments(workdir, *more):
    return [*RUN, *more, f'--workdir={workdir}']


def start(workdir, environment, *more):
    """Returns the process as subprocess has it."""
    return Process(arguments(workdir, *more), environment).popen


def fingerprint(workdir):
    """Returns the fingerprint of a finished run."""
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary['finished'], summary
    return summary['fingerprint']


def unfinished(workdir):
    """Returns what is being written, or deleted, at this moment: {(name, i-node)}."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # one may be finished while we look
        for path in (workdir / 'checkpoints').iterdir():
            if path.suffix == '.unfinished':
                found.add((path.name, path.stat().st_ino))
    return found


def wait_for_save(process, workdir, old, number):
    """Waits for the beginning of this save of the process, counted from 1, or for its end."""
    seen = old
    while process.poll() is None and number:
        found = unfinished(workdir) - seen
        seen, number = seen | found, number - bool(found)
        time.sleep(0.001)


def kill_until_it_ends(workdir, kills, rng, environment, launch=Process):
    """Kills a run so often, or until it ends before its kill, and lets it end; returns counts.

    Every second kill waits for one of the first four saves of the process and comes within 0.1 s of
    its beginning; the others come at any moment in 0 .. 5 s after the start of the process: while
    it imports, compiles or trains.
    """
    counts = {'kills': 0, 'during_a_save': 0, 'resumes': 0}
    while True:
        old = unfinished(workdir)  # what the process before has left
        process = launch(arguments(workdir, *OFTEN), environment)
        if counts['kills'] < kills:
            if counts['kills'] % 2 == 0:
                wait_for_save(process, workdir, old, rng.randint(1, 4))
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(0, 5))
            process.send_signal(signal.SIGKILL)
        code, output, errors = process.end()
        counts['resumes'] += 'continues from step' in output
        if code == -signal.SIGKILL:
            counts['kills'] += 1
            counts['during_a_save'] += bool(unfinished(workdir) - old)
            continue
        assert (code, errors) == (0, ''), output + errors
        assert not unfinished(workdir)
        return counts


def logged(workdir):
    """Returns what metrics.jsonl says of the run itself, in its order: nothing of time."""
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [
        {key: row[key] for key in row if key != 'images_per_s'}
        for row in rows
        if row['kind'] in ('train', 'evaluation')
    ]


def main(kills, seed):
    environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        process = start(folder / 'whole', environment)
        output, errors = process.communicate()
        assert process.returncode == 0, output + errors
        # Compiled once for all that follow: only so do kills hit the steps, and not the compiler.
        environment['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'cache')
        environment['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
        counts = {'kills': 0}
        runs = wrong = 0
        while counts['kills'] < kills:
            workdir = folder / f'killed-{runs}'
            share = min(5, kills - counts['kills'])
            more = kill_until_it_ends(workdir, share, random.Random(f'{seed} {runs}'), environment)
            counts = {key: counts.get(key, 0) + value for key, value in more.items()}
            wrong += fingerprint(workdir) != fingerprint(folder / 'whole')
            wrong += logged(workdir) != logged(folder / 'whole')
            runs += 1
        print(json.dumps(counts | {'runs': runs, 'wrong': wrong}))
        assert not wrong


if __name__ == '__main__':
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
