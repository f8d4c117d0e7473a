"""Signals: the first requests a stop, or raises KeyboardInterrupt; the second ends the process."""

import contextlib
import math
import os
import select
import signal
import threading
import time
from types import FrameType
from typing import Any

from afkd_jax.errors import EXIT_KILLED

_NO_EFFECT_S = 0.5  # an interrupt is announced if it has not ended the process after that
_SAME_SIGNAL_S = 1.0  # SIGTERMs closer than this count once
_SHOW_CURSOR = '\x1b[?25h\n'


class Interrupt:
    """A context in which the first signal sets `requested` and the second ends the process.

    A thread counts them: the main thread may be inside the compiler for seconds, where Python
    neither runs signal handlers nor distinguishes two signals from one.

    Attributes:
      requested: whether a signal has come.
      effect: of the first signal at present, for its message.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested, self.effect = False, 'stops before the first step'

    def __enter__(self) -> 'Interrupt':
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            # Python writes the number of each signal to this pipe when it arrives.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write)
            self._previous = self._handle()
            self._thread = threading.Thread(target=self._count, daemon=True)
            self._thread.start()
        return self

    def _handle(self) -> dict[int, Any]:
        """Sets the handlers of signals; returns those before."""
        return {each: signal.signal(each, self._request) for each in self.SIGNALS}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _count(self) -> None:
        count, terminated_at = 0, -math.inf
        while numbers := os.read(self._read, 1):
            if numbers[0] not in self.SIGNALS:
                continue
            if numbers[0] == signal.SIGTERM:
                # Schedulers, and timeout(1), send SIGTERM to a process and at once to its group.
                before, terminated_at = terminated_at, time.monotonic()
                if terminated_at - before < _SAME_SIGNAL_S:
                    continue
            count += 1
            if count == 1:
                self._announce(numbers[0])
                continue
            if os.isatty(2):
                _write(_SHOW_CURSOR)  # a progress bar hides it
            _write('error: interrupted; what was written before is intact\n')
            os._exit(EXIT_KILLED)

    def _announce(self, number: int) -> None:
        _write(f'{signal.Signals(number).name}: {self.effect}; once more ends at once\n')

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)


class Cancel(Interrupt):
    """A context in which Ctrl-C raises KeyboardInterrupt as usual, and the second ends the process.

    If the first has no effect yet, because the main thread is inside the compiler, it is announced.
    """

    SIGNALS = (signal.SIGINT,)

    def __init__(self):
        super().__init__()
        self.effect = 'ends after the compilation, or another call that cannot be interrupted'

    def _handle(self) -> dict[int, Any]:
        return {}

    def _announce(self, number: int) -> None:
        second, _, _ = select.select([self._read], [], [], _NO_EFFECT_S)
        if not second:
            super()._announce(number)


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # e.g. a pipe whose reader is gone
        os.write(2, text.encode())
