"""Trackers of the config: which, what happens when one fails, and TensorBoard's event files."""

import pathlib
import struct
import sys

import pytest
from conftest import tiny_config
from tensorboardX.proto import event_pb2

from afkd_jax.devices.signals import Interrupt
from afkd_jax.errors import UserError
from afkd_jax.method.metrics import Evaluation
from afkd_jax.registry import TRACKERS
from afkd_jax.report import trackers
from afkd_jax.report.trackers import (
    EpochEnd,
    EvaluationValues,
    Finished,
    Start,
    Tracker,
    Trackers,
    TrainValues,
    Warned,
)
from afkd_jax.training import loop

CONFIG = tiny_config(trackers=('tensorboard',))


class Listing(Tracker):
    """Keeps the events; raises at those of a kind, or where it is asked to."""

    def __init__(self, bad=()):
        super().__init__()
        self.events, self.bad, self.closed = [], bad, 0

    def handle(self, event):
        self.events.append(event)
        if type(event) in self.bad:
            raise ValueError('a bad\nevent')

    def sync(self):
        if 'sync' in self.bad:
            raise OSError(28, 'No space left on device')

    def close(self):
        self.closed += 1
        if 'close' in self.bad:
            raise RuntimeError


@pytest.mark.parametrize(
    ('bad', 'words'),
    [
        (EpochEnd, 'ValueError: a bad'),
        ('sync', 'OSError: [Errno 28] No space left on device'),
        ('close', 'RuntimeError'),
    ],
)
def test_a_tracker_that_fails_is_left_out_with_a_warning(bad, words):
    required, failing, other = Listing(), Listing([bad]), Listing()
    events = [TrainValues(1, 0.5, {}, None, 0), EpochEnd(2, 1, {}, None, 0), Warned(3, 'x')]
    with Trackers({'mine': failing, 'other': other}) as all_of_them:
        all_of_them.required = [required]
        for event in events:
            all_of_them.handle(event)
            all_of_them.sync()
    (warning,) = (event for event in required.events if event not in events)
    text = f'tracker "mine" failed ({words}); the run continues without it'
    assert warning == Warned({EpochEnd: 2, 'sync': 1, 'close': 3}[bad], text)
    assert [event for event in required.events if event != warning] == events
    # It hears no more, and the others miss nothing.
    assert len(failing.events) == {EpochEnd: 2, 'sync': 1, 'close': 3}[bad]
    assert [event for event in other.events if event != warning] == events
    assert failing.closed
    assert (other.closed, required.closed) == (1, 0)


def test_the_error_of_what_writes_the_result_ends_the_run():
    failing = Listing([Warned])
    with Trackers({}) as all_of_them:
        all_of_them.required = [failing]
        with pytest.raises(ValueError, match='a bad'):
            all_of_them.handle(Warned(1, 'x'))


def test_a_tracker_that_cannot_be_made_is_an_error_before_the_run(tmp_path, monkeypatch):
    TRACKERS.names()  # loads the built-in ones, which stay
    monkeypatch.setattr(TRACKERS, '_parts', dict(TRACKERS._parts))
    TRACKERS.register('broken')(lambda config, workdir: 1 / 0)
    made = Listing()
    TRACKERS.register('made')(lambda config, workdir: made)
    for name, message in (
        ('tensorbord', 'there is no tracker "tensorbord"; did you mean "tensorboard"?'),
        ('broken', '"broken" cannot be used (ZeroDivisionError: division by zero); mend it, or'),
    ):
        with pytest.raises(UserError) as error:
            trackers.create(tiny_config(trackers=('made', name)), tmp_path)
        assert str(error.value).startswith(f'config.trackers: {message}')
    assert made.closed == 2  # one cannot be made: those before it are closed
    # Images that cannot be read: likewise.
    config = tiny_config(trackers=('made',), dataset=f'idx:{tmp_path}')
    with pytest.raises(UserError, match='there is no file'):
        loop.train(config, tmp_path / 'run', None, Interrupt())
    assert made.closed == 3
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)  # as where it is not installed
    message = 'extra "tensorboard": python -m pip install tensorboardX'
    with pytest.raises(UserError, match=f'config.trackers: "tensorboard" needs .*{message}'):
        trackers.create(CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


def read(folder: pathlib.Path):
    """Returns the events that TensorBoard shows of a folder.

    Like TensorBoard it drops, when a writer starts, what earlier files have from its step on.
    """
    events = []
    for path in sorted(folder.glob('events.*')):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack('<Q', data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                events = [one for one in events if one.step < event.step]
            events.append(event)
    return events


def scalars(folder):
    """Returns (step, tag, value) of all scalars."""
    return [
        (event.step, value.tag, round(value.simple_value, 4))
        for event in read(folder)
        for value in event.summary.value
        if value.WhichOneof('value') == 'simple_value'
    ]


def epoch(tracker, first, last):
    """Takes these steps, and ends an epoch after the last."""
    for step in range(first, last + 1):
        means = {'cross_entropy': [step + 0.25, step + 0.5], 'learning_rate_logit': 0.125}
        tracker.handle(TrainValues(step, step / 4, means, 100.0 if step > 1 else None, 0))
    scores = Evaluation([last, 2.0, 3.0], [0.25, 0.5, 0.75], None)
    tracker.handle(EvaluationValues(last, last // 4, 'test', scores))


def start(step, epoch_ended=True):
    return Start(step, 8, ('tiny-8-2', 'runs/a:1'), CONFIG, '1 x cpu', epoch_ended)


def test_tensorboard_has_each_value_once_also_after_kills(tmp_path):
    def opened():
        return trackers.create(CONFIG, tmp_path)['tensorboard']

    killed = opened()
    killed.handle(start(0))
    epoch(killed, 1, 4)
    killed.sync()  # a checkpoint at step 4, before it is known that the epoch has ended
    epoch(killed, 5, 8)
    killed.sync()
    again = opened()
    again.handle(start(4, epoch_ended=False))
    epoch(again, 5, 4)  # the evaluation comes again
    epoch(again, 5, 8)
    rows = [{'test_accuracy': value} for value in (8.0, 2.0, 3.0)]
    curves = tmp_path / 'curves.png'
    curves.write_bytes(b'\x89PNG\r\n\x1a\n' + b'\0\0\0\rIHDR' + struct.pack('>II', 30, 20))
    again.handle(Finished(8, {'networks': rows[:2], 'ensemble': rows[2]}, curves))
    again.close()

    folder = tmp_path / 'tensorboard'
    train = scalars(folder / 'train')
    assert sorted(train) == sorted(
        [(step, 'cross_entropy/1_tiny-8-2', step + 0.25) for step in range(1, 9)]
        + [(step, 'cross_entropy/2_runs_a_1', step + 0.5) for step in range(1, 9)]
        + [(step, 'learning_rate_logit', 0.125) for step in range(1, 9)]
        + [(step, 'images_per_s', 100.0) for step in range(2, 9)]
    )
    tested = [one for one in scalars(folder / 'test') if one[1].startswith('accuracy')]
    assert tested == [
        (step, f'accuracy/{tag}', value)
        for step in (4, 8)
        for tag, value in (('1_tiny-8-2', step), ('2_runs_a_1', 2), ('ensemble', 3))
    ]
    assert scalars(folder) == [
        (8, 'test_accuracy/1_tiny-8-2', 8),
        (8, 'test_accuracy/2_runs_a_1', 2),
        (8, 'test_accuracy/ensemble', 3),
    ]
    values = {value.tag: value for event in read(folder) for value in event.summary.value}
    image = values['curves'].image
    assert (image.width, image.height) == (30, 20)
    assert image.encoded_image_string == curves.read_bytes()
    hparams = values['_hparams_/session_start_info'].metadata.plugin_data.content
    assert b'loss.temperature' in hparams
    killed.close()


def test_event_files_of_the_same_second_are_two(tmp_path):
    for _ in range(2):
        with trackers.create(CONFIG, tmp_path)['tensorboard'] as tracker:
            tracker.handle(start(0))
    assert len(list((tmp_path / 'tensorboard').glob('events.*'))) == 2
