"""`captioner report`: a training run, or two that are compared, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from captioner.cli import output
from captioner.cli.arguments import parse
from captioner.config import Statistics
from captioner.errors import CaptionerError


@dataclass(frozen=True)
class ReportArguments:
    """Show a training run as one HTML page: curves, captions, alarms, settings. It may still be training.

    The page holds everything that it shows, and needs no network.
    """

    # folder of the run: the --output of captioner train
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    against: Path | None = None  # folder of another run, to compare the two photo by photo
    output: Path | None = None  # HTML file; by default report.html, or comparison.html, in the folder of the run
    photos: int = 12  # validation photos whose captions are shown through the epochs
    statistics: Statistics = field(default_factory=Statistics)
    open: bool = False  # show the page in the browser


def command(arguments: Sequence[str], prog: str) -> int:
    """Write the page, print where it is, and return the exit status."""
    chosen = parse(ReportArguments, arguments, prog)
    if chosen.photos < 0:
        raise CaptionerError(f"photos is {chosen.photos}; expected 0 or more")

    from captioner.report.run import read

    run = read(chosen.run)
    if chosen.against is None:
        from captioner.report.page import report

        html = report(run, chosen.photos)
    else:
        from captioner.report.comparison import comparison

        html = comparison(run, read(chosen.against), chosen.statistics)
    path = chosen.output or chosen.run / ("report.html" if chosen.against is None else "comparison.html")
    output.write(path, html)
    output.say(f"the page is in {path}")
    if chosen.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return 0
