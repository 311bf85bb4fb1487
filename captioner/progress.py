"""A progress bar on standard error: what is done, how fast, and how long it will take."""

from __future__ import annotations

import time
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console


class Progress:
    """A bar; nothing is drawn where standard error is no terminal."""

    def __init__(self, title: str, total: int, unit: str, *, shown: bool = True) -> None:
        """Prepare a bar.

        Args:
            title: what is being done.
            total: units to do.
            unit: their name, in the plural.
            shown: false draws nothing (processes other than the first).
        """
        console = Console(stderr=True)
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[speed]:,.0f} " + unit + "/s"),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not shown or not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, speed=0.0, note="")
        self._done = 0
        self._total = total
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, units: int, note: str = "") -> None:
        """Count units that were done.

        Args:
            units: how many.
            note: shown behind the bar from now on, if not empty.
        """
        self.set(self._done + units, self._total, note)

    def set(self, done: int, total: int, note: str = "") -> None:
        """Say how many units are done of how many."""
        self._done, self._total = min(done, total), total
        speed = done / max(1e-9, time.monotonic() - self._began)
        if note:
            self._bar.update(self._task, note=note)
        self._bar.update(self._task, completed=self._done, total=total, speed=speed)
