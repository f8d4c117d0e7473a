"""Clocks: laps, and the time of a run by what it was spent on."""

import contextlib
import time

import pytest

from afkd_jax.checkpoints.progress import Progress
from afkd_jax.training.clock import Clock, Spent


@pytest.fixture
def sleep(monkeypatch):
    """Returns a function that lets time pass at once; the time of this process starts at 0."""
    now = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])

    def sleep(seconds):
        now[0] += seconds

    return sleep


def test_a_lap_has_the_images_and_seconds_since_the_last_one(sleep):
    clock = Clock(batch_size=32, step=5)
    sleep(2)
    assert clock.lap(9) == (4 * 32, 2)
    sleep(3)
    clock.restart(10)  # after an evaluation
    sleep(1)
    assert clock.lap(12) == (2 * 32, 1)
    assert clock.lap(12) == (0, 0)


def test_each_second_counts_once_and_the_parts_sum_to_the_whole(sleep):
    progress = Progress.start(2)
    spent = Spent()
    sleep(1)
    with spent.on('train'):
        sleep(2)
        with spent.on('evaluate'):
            sleep(4)
        sleep(8)
        with contextlib.suppress(ValueError), spent.on('save'):
            sleep(16)
            raise ValueError
    sleep(32)
    spent.store(progress)
    parts = {'data': 0, 'compile': 0, 'train': 10, 'evaluate': 4, 'save': 16, 'other': 33}
    assert progress.seconds == parts
    assert progress.wall_s == 63

    sleep(100)  # between two processes
    again = Spent()
    with again.on('data'):
        sleep(5)
    again.resume(Progress.from_json(progress.to_json()))
    sleep(1)
    again.store(progress)
    assert progress.seconds == parts | {'data': 5, 'other': 34}
    assert progress.wall_s == 63 + 6


def test_a_checkpoint_of_an_older_version_has_only_the_whole(sleep):
    progress = Progress.start(2)
    progress.wall_s = 7.0
    old = {k: v for k, v in progress.to_json().items() if k not in ('seconds', 'epoch')}
    spent = Spent()
    spent.resume(Progress.from_json(old))
    spent.store(progress)
    assert (progress.wall_s, progress.seconds['other']) == (7, 7)
    assert progress.epoch.empty
