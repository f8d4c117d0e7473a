"""SIGINT and SIGTERM: the first requests a stop after the step, the second ends the process."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType

from afkd_jax.errors import EXIT_KILLED

_SAME_SIGNAL_S = 1.0  # SIGTERMs closer than this count once
_SHOW_CURSOR, _CLEAR_LINE = b'\x1b[?25h\n', b'\r\x1b[K'
_MESSAGES = (
    b'stopping after this step, with a checkpoint; once more ends at once\n',
    b'error: interrupted; what was written before is intact\n',
)


class Interrupt:
    """A context in which the first signal sets `requested` and the second ends the process.

    A thread counts them: the main thread may be inside the compiler for seconds, where Python
    neither runs signal handlers nor distinguishes two signals from one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False

    def __enter__(self) -> 'Interrupt':
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            # Python writes the number of each signal to this pipe when it arrives.
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write)
            self._previous = {each: signal.signal(each, self._request) for each in self.SIGNALS}
            self._thread = threading.Thread(target=self._count, daemon=True)
            self._thread.start()
        return self

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
            message = _MESSAGES[count]
            count += 1
            if os.isatty(2):
                # A progress bar hides the cursor, and erases up to two lines where it moves on.
                last = count == len(_MESSAGES)
                message = _SHOW_CURSOR + message if last else _CLEAR_LINE + message + b'\n'
            with contextlib.suppress(OSError):  # e.g. a pipe whose reader is gone
                os.write(2, message)
            if count == len(_MESSAGES):
                os._exit(EXIT_KILLED)

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread
        self._thread.join()
        os.close(self._read)
