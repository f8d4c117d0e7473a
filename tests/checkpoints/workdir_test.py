"""The workdir: its run, its lock, and its files."""

import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import tiny_config

from afkd_jax.checkpoints import files, lock
from afkd_jax.checkpoints import workdir as workdir_lib
from afkd_jax.config import Config
from afkd_jax.errors import UserError
from configs import digits

HOLDER = """
import pathlib, sys, time
from afkd_jax.checkpoints import workdir
from afkd_jax.config import Config
from configs import digits
with workdir.claimed(pathlib.Path(sys.argv[1]), Config.of(digits.get_config()), print):
    print('held', flush=True)
    time.sleep(60)
"""


def claimed(folder, config=None):
    logged = []
    return workdir_lib.claimed(folder, config or tiny_config(), logged.append), logged


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / 'run'."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLDER, tmp_path / 'run'],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.communicate()


def test_a_workdir_in_use_is_rejected_and_its_owner_is_named(holder, tmp_path):
    context, _ = claimed(tmp_path / 'run')
    message = f'is in use by process {holder.pid} on {socket.gethostname()}'
    started = time.monotonic()
    with pytest.raises(UserError, match=message), context:
        pass
    assert time.monotonic() - started < 5  # at once: its process lives on this machine


def test_the_lock_of_a_process_that_was_killed_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / 'run' / 'lock').exists()
    context, logged = claimed(tmp_path / 'run', Config.of(digits.get_config()))
    started = time.monotonic()
    with context as check_held:
        check_held()
    assert time.monotonic() - started < 5
    (line,) = logged
    assert f'took over the lock of process {holder.pid} on {socket.gethostname()}' in line
    assert not (tmp_path / 'run' / 'lock').exists()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock of a process on another machine, with a short lease."""
    monkeypatch.setattr(lock, 'LEASE_S', 2.0)
    path = tmp_path / 'run' / 'lock'
    path.parent.mkdir()
    path.write_text('filelock/2\npid=4711\nhost=elsewhere\nmode=lease\ntoken=ab\nduration=2.0\n')
    return path


def test_the_lock_of_another_machine_is_taken_over_after_the_lease(elsewhere, tmp_path):
    context, logged = claimed(tmp_path / 'run')
    with context:
        pass
    assert 'locked by process 4711 on elsewhere; waiting 2 s' in logged[0]
    assert 'took over' in logged[1]


def test_a_lock_that_another_machine_renews_is_respected(elsewhere, tmp_path):
    done = threading.Event()

    def live():
        while not done.wait(0.2):
            os.utime(elsewhere)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        context, _ = claimed(tmp_path / 'run')
        with (
            pytest.raises(UserError, match='in use by process 4711 on elsewhere; .*delete'),
            context,
        ):
            pass
    finally:
        done.set()
        thread.join()
    assert elsewhere.read_text().startswith('filelock/2\npid=4711')


def test_a_lock_that_is_lost_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'LEASE_S', 0.6)
    context, _ = claimed(tmp_path)
    with context as check_held:
        (tmp_path / 'lock').unlink()
        time.sleep(2)
        with pytest.raises(
            UserError, match='was taken by another process, or its lock was deleted'
        ):
            check_held()


def test_fields_that_do_not_change_the_bits_may_change(tmp_path):
    changed = tiny_config(
        checkpoint__keep=7, checkpoint__every_steps=3, checkpoint__every_minutes=0.5,
        checkpoint__every_epochs=2,
        on_nonfinite='skip', saturation_steps=9, data__data_dir='x', data__manual_dir='y',
    )  # fmt: skip
    for config in (tiny_config(), changed):
        with claimed(tmp_path, config)[0]:
            pass
    # The session writes it, once it has seen the checkpoints.
    assert '"keep": 7' not in (tmp_path / 'config.json').read_text()
    with pytest.raises(UserError, match=r'another config \(log_every: 10 -> 11\)'):
        workdir_lib.check(tmp_path, tiny_config(log_every=11))


@pytest.mark.parametrize('kind', ['folder', 'idx'])
def test_images_may_lie_in_another_directory(kind, tmp_path):
    first, other = (tiny_config(dataset=f'{kind}:{place}') for place in ('/a/images', '/b/images/'))
    workdir_lib.write_config(tmp_path, first)
    workdir_lib.check(tmp_path, other)
    assert workdir_lib.moved(tmp_path, first) is None
    words = f'are those of {kind}:/b/images/, which before were in {kind}:/a/images'
    assert words in workdir_lib.moved(tmp_path, other)
    with pytest.raises(UserError, match=f"dataset: '{kind}:' -> 'tfds:mnist'"):
        workdir_lib.check(tmp_path, tiny_config(dataset='tfds:mnist'))


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file is a file; name a directory'):
        workdir_lib.check(tmp_path / 'file', tiny_config())
    context, _ = claimed(tmp_path / 'file' / 'run')
    with pytest.raises(UserError, match='cannot be used .Not a directory'), context:
        pass


def test_a_workdir_that_cannot_be_written_is_rejected(tmp_path):
    mount = ['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting needs rights that are not there')
    try:
        for folder in (tmp_path, tmp_path / 'run'):
            context, _ = claimed(folder)
            with pytest.raises(UserError, match='cannot be used .Read-only file system'), context:
                pass
    finally:
        subprocess.run(['umount', '-l', str(tmp_path)], check=True)


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for content in ('a', 'b', 'c'):
        (tmp_path / 'checkpoints').mkdir(exist_ok=True)
        path = tmp_path / 'checkpoints' / '4'
        path.write_text(content)
        files.set_aside(tmp_path, path)
    aside = tmp_path / 'set_aside' / 'checkpoints'
    assert {path.name: path.read_text() for path in aside.iterdir()} == {
        '4': 'a', '4.2': 'b', '4.3': 'c',
    }  # fmt: skip


@pytest.mark.parametrize('text', ['', '{', '[]', '{"finished": false}', '{"finished": 1}', '\0'])
def test_only_the_summary_of_a_finished_run_counts(text, tmp_path):
    assert workdir_lib.finished_summary(tmp_path) is None
    (tmp_path / 'summary.json').write_text(text)
    assert workdir_lib.finished_summary(tmp_path) is None
    (tmp_path / 'summary.json').write_text('{"finished": true, "steps": 3}')
    assert workdir_lib.finished_summary(tmp_path) == {'finished': True, 'steps': 3}


@pytest.mark.parametrize('name', ['7', 'summary.json'])
def test_what_is_set_aside_may_go_to_another_file_system(name, tmp_path, monkeypatch):
    path, rename = tmp_path / name, pathlib.Path.rename
    if name == '7':
        path.mkdir()
        (path / 'record.json').write_text('whole')
    else:
        path.write_text('whole')

    def of_one_disk(self, target):
        if self.parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, 'rename', of_one_disk)
    target = files.set_aside(tmp_path, path)
    assert (target / 'record.json' if name == '7' else target).read_text() == 'whole'
    assert sorted(tmp_path.iterdir()) == [tmp_path / 'set_aside']
    assert [*target.parent.iterdir()] == [target]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'x.json'
    files.write_json(path, {'a': 1})

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        files.write_json(path, {'a': 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
