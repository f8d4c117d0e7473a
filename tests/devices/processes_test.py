"""Several processes on one machine, as on several: gloo collectives, a few CPU devices each."""

import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import forks
import jax
import kills
import numpy as np
import pytest

from afkd_jax.devices import processes

ROOT = pathlib.Path(__file__).parents[2]
# Tiny networks: what processes do does not depend on size. 15 steps, of which each third ends an
# epoch, so that a signal after the first log line arrives long before the end.
RUN = [
    '--config=tests/tiny.py',
    '--config.epochs=5',
    '--config.data.train_examples=213',
    '--config.log_every=2',
    '--config.method=kd_ring',
    '--config.checkpoint.every_steps=3',
    '--config.data.placement=stream',
]
LOST_S = 6  # instead of processes.LOST_AFTER_S, to wait less


class Group:
    """launch.py in `count` processes that run together, `devices` CPU devices each."""

    def __init__(
        self, count, devices, workdir, *arguments, own=((), ()), run=RUN, variables=(), homes=()
    ):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        where = [f'--coordinator_address=127.0.0.1:{port}', f'--num_processes={count}']
        self.processes = [
            forks.Launch(
                [*run, *arguments, f'--workdir={workdir}']
                + (where if count > 1 else [])
                + ([f'--process_id={index}'] if count > 1 else [])
                + [*(own[index] if index < len(own) else ())],
                forks.environment(devices)
                | dict(variables)
                | ({'HOME': str(homes[index])} if homes else {}),
            )
            for index in range(count)
        ]

    def end(self):
        """Returns [(exit code, output, errors)] when all have ended."""
        return [process.end() for process in self.processes]

    def wait_for(self, condition):
        while not condition() and all(process.poll() is None for process in self.processes):
            time.sleep(0.02)


def finished(ended, workdir):
    """Returns the summary of a run whose processes have all ended well."""
    assert [code for code, *_ in ended] == [0] * len(ended), ended
    # Only process 0 logs; the rest is Gloo's.
    for _, output, _ in ended[1:]:
        # Gloo writes its messages in pieces, and those of several devices interleaved.
        words = (
            r'\[Gloo\]|Rank|is connected to|peer ranks|Expected number of connected|is :|[\d.\s]'
        )
        assert not re.sub(words, '', output), output
    summary = json.loads((workdir / 'summary.json').read_text())
    assert summary['finished']
    return summary


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """Returns (workdir, summary) of two processes with two devices each, 4 shards of the batch."""
    workdir = tmp_path_factory.mktemp('two') / 'run'
    return workdir, finished(Group(2, 2, workdir).end(), workdir)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """Returns (workdir, summary) of one process with four devices."""
    workdir = tmp_path_factory.mktemp('one') / 'run'
    group = Group(1, 4, workdir, run=[field for field in RUN if 'placement' not in field])
    return workdir, finished(group.end(), workdir)


def losses(workdir):
    lines = (json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines())
    return np.array(
        [
            [network['cross_entropy'] for network in line['networks']]
            for line in lines
            if line['kind'] == 'train'
        ]
    )


def assert_same_run(summary, workdir, other, other_workdir):
    """Equal to rounding, which grows along the run."""
    mine, theirs = losses(workdir), losses(other_workdir)
    assert mine.shape == theirs.shape
    np.testing.assert_allclose(mine[:2], theirs[:2], rtol=1e-4)
    np.testing.assert_allclose(mine, theirs, rtol=0.05)
    for a, b in zip(summary['networks'], other['networks'], strict=True):
        assert abs(a['test_accuracy'] - b['test_accuracy']) < 2  # 359 images


def test_two_processes_make_the_run_of_one(one, two):
    assert two[1]['device'] == one[1]['device'] + ', 2 processes'
    assert_same_run(two[1], two[0], one[1], one[0])
    # Training itself checks that all processes end in one fingerprint (processes.assert_equal).


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_and_they_continue_to_the_bit(two, tmp_path):
    group = Group(2, 2, tmp_path)
    metrics = tmp_path / 'metrics.jsonl'
    group.wait_for(lambda: metrics.exists() and '"train"' in metrics.read_text())
    group.processes[1].send_signal(signal.SIGTERM)
    ended = group.end()
    assert [code for code, *_ in ended] == [75, 75], ended
    assert 'the same command continues' in ended[0][1]
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert not summary['finished']
    assert 0 < summary['steps'] < two[1]['steps']
    again = finished(Group(2, 2, tmp_path).end(), tmp_path)
    assert again['fingerprint'] == two[1]['fingerprint']
    assert kills.logged(tmp_path) == kills.logged(two[0])


@pytest.fixture(scope='module')
def lost(tmp_path_factory):
    """Returns victim -> (workdir, what the processes end with, after how long).

    Of two processes, with one network each, this one was killed; both groups wait at once.
    """
    soon, groups = {'LOST_AFTER_S': str(LOST_S)}, {}
    for victim in (1, 0):
        workdir = tmp_path_factory.mktemp('lost')
        group = Group(2, 2, workdir, '--config.mesh.peer=2', variables=soon)
        group.wait_for((workdir / 'checkpoints/3').exists)
        group.processes[victim].send_signal(signal.SIGKILL)
        groups[victim] = workdir, group, time.monotonic()
    return {
        victim: (workdir, group.end(), time.monotonic() - killed_at)
        for victim, (workdir, group, killed_at) in groups.items()
    }


@pytest.mark.parametrize('victim', [pytest.param(1, marks=pytest.mark.slow), 0])
def test_a_lost_process_ends_the_others_and_the_run_continues_with_more(victim, one, lost):
    tmp_path, ended, seconds = lost[victim]
    assert seconds < LOST_S + 15
    code, _, errors = ended[1 - victim]
    assert code == 75, ended
    last = errors.splitlines()[-1]
    assert last.startswith('error: another process of this run was lost'), errors
    assert 'the same command continues' in last
    if victim == 0:  # with others, and on another mesh
        summary = finished(Group(4, 1, tmp_path).end(), tmp_path)
        assert summary['device'].endswith('4 processes')
    else:  # or alone
        summary = finished(Group(1, 4, tmp_path).end(), tmp_path)
    assert_same_run(summary, tmp_path, one[1], one[0])
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    (resume,) = (line for line in map(json.loads, lines) if line['kind'] == 'resume')
    assert resume['step'] >= 3


@pytest.mark.slow
def test_processes_start_from_the_weights_of_a_run(one, tmp_path):
    """One frozen, one that learns; if the source is damaged for one process, all end."""
    start = [
        '--config=tests/tiny.py',
        "--config.networks=('~/source:1','tiny-8-2')",
        "--config.init_from=('','~/source:2')",
        '--config.epochs=1',
        '--config.data.train_examples=213',
        '--config.data.test_examples=8',
        '--config.method=kd_ring',
    ]
    for home in ('whole', 'damaged'):
        shutil.copytree(one[0], tmp_path / home / 'source')
    for path in (tmp_path / 'damaged/source/checkpoints').iterdir():
        (path / 'record.json').write_text('')
    homes = [tmp_path / 'whole', tmp_path / 'damaged']
    groups = {
        'two': Group(2, 1, tmp_path / 'two', run=start, homes=homes[:1] * 2),
        'one': Group(1, 2, tmp_path / 'one', run=start, homes=homes),
        'none': Group(2, 1, tmp_path / 'none', run=start, homes=homes),
    }
    two, alone = (
        finished(group.end(), tmp_path / name) for name, group in groups.items() if name != 'none'
    )
    assert two['fingerprint'] == alone['fingerprint']
    for code, _, errors in groups['none'].end():
        assert code == 1, errors
        assert 'there is no whole checkpoint last in' in errors.splitlines()[-1]
    assert not (tmp_path / 'none').exists()


UNREACHABLE = """
from afkd_jax.devices import processes
processes._CONNECT_S = 3
processes.start('localhost:{port}', 2, 1)
"""


@pytest.fixture(scope='module')
def rejected(tmp_path_factory):
    """Returns a folder and processes that are rejected: they wait for seconds, all at once."""
    folder = tmp_path_factory.mktemp('rejected')
    for name in ('one', 'other'):
        (folder / name).mkdir()
    run = [argument for argument in RUN if 'log_every' not in argument]
    # log_every changes no bit of the run, but when processes wait for each other.
    own = [['--config.log_every=2'], ['--config.log_every=7', '--config.seed=1']]
    other = [f'--workdir={folder / "other/run"}']
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        alone = UNREACHABLE.format(port=free.getsockname()[1])
    return folder, {
        'commands': Group(2, 1, folder / 'run', own=own, run=run),
        'disk': Group(2, 1, folder / 'one/run', own=[[], other]),
        'alone': subprocess.Popen(
            [sys.executable, '-c', alone], cwd=ROOT, stderr=subprocess.PIPE, text=True
        ),
    }


def test_processes_with_different_commands_are_rejected(rejected):
    folder, groups = rejected
    for code, _, errors in groups['commands'].end():
        assert code == 1, errors
        words = 'it differs from process 0 (seed: 0 -> 1; log_every: 2 -> 7)'
        assert words in errors.splitlines()[-1]
    assert not (folder / 'run').exists()


def test_a_process_that_sees_another_disk_is_rejected(rejected):
    ended = rejected[1]['disk'].end()
    for code, _, errors in ended:
        assert code == 1, ended
        assert 'is not seen by every process' in errors


def test_processes_that_do_not_start_are_reported_after_a_while(rejected):
    process = rejected[1]['alone']
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    words = 'error: --coordinator_address: the other processes cannot be reached'
    assert words in ' '.join(errors.splitlines())


def test_a_port_that_is_in_use_is_rejected(tmp_path):
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = taken.getsockname()[1]
        where = [f'--coordinator_address=localhost:{port}', '--num_processes=2', '--process_id=0']
        ((code, _, errors),) = Group(1, 1, tmp_path / 'run', *where).end()
    assert code == 1
    assert re.fullmatch(
        f'error: --coordinator_address: port {port} of this machine cannot be used .*\n', errors
    )


def test_a_single_process_gathers_its_own_values():
    assert processes.count() == 1
    assert processes.is_primary()
    assert processes.all_gather({'a': (1, 2)}) == [{'a': [1, 2]}]
    assert processes.broadcast(3) == 3
    assert processes.raise_on_all(lambda: 4) == 4
    agreed = processes.AnyProcess(jax.sharding.Mesh(np.array(jax.devices()), ('data',)))
    assert agreed(True, False) == (True, False)
