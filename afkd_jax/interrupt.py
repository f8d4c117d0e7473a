"""SIGINT and SIGTERM: the first asks the loop to stop after its step, the second ends at once."""

import os
import signal
import threading
from types import FrameType


class Interrupt:
    """A context in which the first signal sets `requested`; the second acts as it does outside."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self._previous = {}

    def __enter__(self) -> 'Interrupt':
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b'stopping after this step, with a checkpoint; once more ends at once\n')
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
