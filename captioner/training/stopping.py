"""SIGTERM and Ctrl-C: noted, so that the run can save first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Signals:
    """A context in which SIGTERM and Ctrl-C are noted instead of stopping at once; a second one stops at once."""

    def __init__(self) -> None:
        self.noted: int | None = None  # number of the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # only that one may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.getsignal(number) or signal.SIG_DFL
                signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def stop(self) -> None:
        """End this process as the noted signal would have.

        Raises:
            KeyboardInterrupt: it was Ctrl-C.
            SystemExit: it was another, with the exit status that shells give for it.
        """
        assert self.noted is not None
        raise KeyboardInterrupt if self.noted == signal.SIGINT else SystemExit(128 + self.noted)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
