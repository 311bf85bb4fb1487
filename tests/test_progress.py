"""Progress without a terminal: a line now and then; on one, a bar."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from captioner import progress
from captioner.progress import Progress

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_every_30_seconds(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "captioner")
    with Progress("features", 10_000, "photos") as shown:
        for _ in range(8):
            clock.now += 10
            shown.advance(500)
            if clock.now == 1050:
                shown.advance(0, "loss 3.2")
    assert caplog.messages == [
        "features: 1,500 of 10,000 photos, 50/s, 3 min left",
        "features: 3,000 of 10,000 photos, 50/s, 2 min left; loss 3.2",
    ]


def test_the_total_may_be_learned_on_the_way(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "captioner")
    with Progress("features", 0, "photos") as shown:
        clock.now += 40
        shown.set(0, 4_000_000)
        clock.now += 60
        shown.set(100, 4_000_000)
    first, second = caplog.messages
    assert first == "features: 0 of 4,000,000 photos, 0/s, unknown time left"
    assert second == "features: 100 of 4,000,000 photos, 1/s, 1111 h 05 min left"


def test_short_work_and_other_processes_say_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "captioner")
    with Progress("features", 10, "photos") as shown:
        clock.now += 29
        shown.advance(10)
    with Progress("features", 10, "photos", shown=False) as shown:
        clock.now += 500
        shown.advance(10)
    assert caplog.messages == []


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("epoch [1]", 200, "captions") as shown:
        shown.advance(50, "loss [bold]3.2")
        assert shown._bar is not None
        shown._bar.refresh()
    text = terminal.getvalue()
    for part in ("epoch [1]", "50/200", "captions/s", "loss [bold]3.2"):
        assert part in text


def test_rich_is_imported_only_for_a_terminal() -> None:
    code = (
        "import sys; from captioner.progress import Progress\n"
        "with Progress('a', 1, 'b') as shown: shown.advance(1)\n"
        "assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, stderr=subprocess.PIPE)
