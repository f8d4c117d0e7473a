"""TensorBoard: event files in the run directory, written by tensorboardX, without TensorFlow.

tensorboard/train, validation and test hold the values of the splits under the same names, so that
TensorBoard draws them in one chart. tensorboard/ itself holds the config, as hyper-parameters, the
final test accuracies and the curves.
"""

import pathlib
import re
import struct
import time
from typing import Any

from afkd_jax import config as config_lib
from afkd_jax.config import Config
from afkd_jax.errors import UserError
from afkd_jax.registry import register_tracker
from afkd_jax.report.trackers import (
    EvaluationValues,
    Event,
    Finished,
    Start,
    Tracker,
    TrainValues,
)

_FLUSH_S = 10.0  # how often what is written becomes visible, besides at each checkpoint


@register_tracker('tensorboard')
class TensorBoard(Tracker):
    """Writes the values of log lines and evaluations, and the result.

    Args:
      config: unused; that of Start is the same.
      workdir: exists when the run starts.
    """

    def __init__(self, config: Config, workdir: pathlib.Path):
        super().__init__()
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            raise UserError(
                'config.trackers: "tensorboard" needs the package tensorboardX, which is in the '
                'extra "tensorboard": python -m pip install tensorboardX'
            ) from None
        self._folder = workdir / 'tensorboard'
        # Not its SummaryWriter, which writes in a thread behind a short queue: when that thread
        # fails, as on a full disk, nothing is raised and the queue blocks the run for ever.
        self._writer, self._summary = event_file_writer.EventsWriter, summary
        self._event, self._protos = event_pb2, summary_pb2
        self._writers: dict[str, Any] = {}

    def handle(self, event: Event) -> None:
        """See Tracker."""
        match event:
            case Start():
                self._start(event)
            case TrainValues(step, means=means, images_per_s=speed):
                self._scalars('train', step, means | ({'images_per_s': speed} if speed else {}))
            case EvaluationValues(step, split=split, evaluation=evaluation):
                values = {
                    'accuracy': evaluation.accuracy,
                    'cross_entropy': evaluation.cross_entropy,
                }
                values |= {'top5_accuracy': evaluation.top5} if evaluation.top5 else {}
                self._scalars(split, step, values)
            case Finished():
                self._finish(event)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.sync()

    def sync(self) -> None:
        """See Tracker."""
        for writer in self._writers.values():
            writer.flush()  # and fsync
        self._flushed = time.monotonic()

    def _start(self, start: Start) -> None:
        self._tags = [
            f'{k}_{re.sub(r"[^a-zA-Z0-9.-]", "_", name)}' for k, name in enumerate(start.names, 1)
        ]
        self._tags.append('ensemble')
        # TensorBoard drops the events from this step on: a killed process wrote them, and they are
        # written again.
        evaluations = start.step + start.epoch_ended
        purged = {'': start.step + 1, 'train': start.step + 1}
        splits = ['validation', 'test']
        if start.config.ema.decay:
            splits += ['validation_ema', 'test_ema']
        for split, step in (purged | dict.fromkeys(splits, evaluations)).items():
            folder = self._folder / split
            folder.mkdir(parents=True, exist_ok=True)
            # The file's name has the second only, and an existing file would be overwritten.
            writer = self._writer(str(folder / 'events'), f'.{time.time_ns()}')
            self._writers[split] = writer
            self.callback(writer.close)
            session = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(split, step, session_log=session)
        self._flushed = time.monotonic()
        fields = config_lib.flatten(start.config.to_dict())
        plain = {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in fields.items()}
        hparams = self._summary.hparams(plain, [f'test_accuracy/{tag}' for tag in self._tags])
        for summary in hparams[:2]:  # the experiment and the start of the session
            self._write('', start.step, summary=summary)
        self._end_of_session = hparams[2]

    def _finish(self, end: Finished) -> None:
        rows = [*end.summary['networks'], end.summary['ensemble']]
        self._scalars('', end.step, {'test_accuracy': [row['test_accuracy'] for row in rows]})
        self._write('', end.step, summary=self._end_of_session)
        if end.curves:
            png = end.curves.read_bytes()
            width, height = struct.unpack('>II', png[16:24])
            image = self._protos.Summary.Image(
                height=height, width=width, colorspace=4, encoded_image_string=png
            )
            value = self._protos.Summary.Value(tag='curves', image=image)
            self._write('', end.step, summary=self._protos.Summary(value=[value]))

    def _scalars(self, writer: str, step: int, values: dict[str, Any]) -> None:
        """Writes values, one of a name or one per network."""
        rows = []
        for name, value in values.items():
            tagged = zip(self._tags, value, strict=False) if isinstance(value, list) else ()
            rows += [(f'{name}/{tag}', one) for tag, one in tagged] or [(name, value)]
        entry = self._protos.Summary.Value
        values_list = [entry(tag=tag, simple_value=value) for tag, value in rows]
        self._write(writer, step, summary=self._protos.Summary(value=values_list))

    def _write(self, writer: str, step: int, **what: Any) -> None:
        event = self._event.Event(wall_time=time.time(), step=step, **what)
        self._writers[writer].write_event(event)
