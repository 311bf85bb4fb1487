"""Progress on standard error: a bar on a terminal, elsewhere a line every 30 seconds."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

log = logging.getLogger(__name__)

_EVERY = 30.0  # seconds between two lines


class Progress:
    """How far a long piece of work is. Short work without a terminal is passed over in silence."""

    def __init__(self, title: str, total: int, unit: str, *, shown: bool = True) -> None:
        """Begin to measure.

        Args:
            title: of the work.
            total: units to do.
            unit: their name, in the plural.
            shown: false shows nothing (processes other than the first).
        """
        self._title, self._total, self._unit = title, total, unit
        self._shown = shown
        self._done = 0
        self._note = ""
        self._began = self._told = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr is not None and sys.stderr.isatty():
            self._bar, self._task = _bar(self._title, self._total, self._unit)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: int, note: str = "") -> None:
        """Count units that were done.

        Args:
            units: how many.
            note: shown behind the rest from now on, if not empty.
        """
        self.set(self._done + units, self._total, note)

    def set(self, done: int, total: int, note: str = "") -> None:
        """Say how many units are done of how many."""
        self._done, self._total, self._note = min(done, total), total, note or self._note
        now = time.monotonic()
        speed = done / max(1e-9, now - self._began)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, total=total, speed=speed, note=self._note)
        elif self._shown and now - self._told >= _EVERY:
            self._told = now
            left = _duration((total - self._done) / speed) if speed else "unknown time"
            note = f"; {self._note}" if self._note else ""
            counts = f"{self._done:,} of {total:,} {self._unit}"
            log.info("%s: %s, %s/s, %s left%s", self._title, counts, f"{speed:,.3g}", left, note)


def _bar(title: str, total: int, unit: str) -> tuple[Bar, TaskID]:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[speed]:,.0f} " + unit + "/s", markup=False),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
    return bar, bar.add_task(title, total=total, speed=0.0, note="")


def _duration(seconds: float) -> str:
    """Seconds in the units of a clock: "3 h 05 min", "12 min", "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
