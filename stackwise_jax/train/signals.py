"""Signals that ask a run to save and leave: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1.

The handler only notes the first; the loop looks after every step, every batch of an evaluation and every chunk of a
cache, where everything is consistent. A second signal leaves at once.
"""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from stackwise_jax.errors import StoppedError
from stackwise_jax.memory import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Notes signals while it is entered, in the main thread; elsewhere signals keep their meaning.

    Attributes:
      received: the name of the first, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def poll(self, *, together: bool = False) -> None:
        """Raises `StoppedError` when a signal has come.

        Args:
          together: all processes of a run are here. Several stop nowhere else, and by what the first has received.
        """
        if not processes.are_several():
            come = self.received is not None
        else:
            come = together and processes.agreed(self.received is not None)
        if come:
            raise StoppedError(self.received or "a signal to process 0")

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            _tell(f"\nleft at once at a second signal, {name}\n")
            os._exit(128 + number)
        self.received = name
        _tell(f"\n{name}: saving, then leaving; a second signal leaves at once\n")


def _tell(text: str) -> None:
    """Writes past Python's buffers, which the interrupted code may be in the middle of."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
