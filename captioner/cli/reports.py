"""Scores as a table on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from captioner.metrics import Comparison
from captioner.scoring import Evaluation


def show(evaluations: Sequence[Evaluation], comparison: Mapping[str, Comparison]) -> None:
    """Print scores with their intervals, what the captions are like, and how two sets of them differ."""
    table = Table("", box=None)
    for number, found in enumerate(evaluations):
        table.add_column(_name(found, number))
    if comparison:
        table.add_column("difference")
        table.add_column("p")
    first = evaluations[0]
    for score in (*first.scores.corpus, *first.java):
        cells = [_score(found, score) for found in evaluations]
        if score in comparison:
            by = comparison[score]
            cells += [f"{by.difference:+.4f} [{by.interval.low:+.4f}, {by.interval.high:+.4f}]", f"{by.p_value:.4f}"]
        table.add_row(score, *cells)
    table.add_section()
    for name in vars(first.diversity):
        values = [getattr(found.diversity, name) for found in evaluations]
        if values[0] is not None:
            table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values))
    Console(width=max(100, Console().width)).print(table)


def _name(found: Evaluation, number: int) -> Text:
    return Text(str(found.hypotheses.origin.get("results", "score" if number == 0 else "")))


def _score(found: Evaluation, score: str) -> str:
    if score in found.java:
        return f"{found.java[score][0]:.4f}"
    value = f"{found.scores.corpus[score]:.4f}"
    if score not in found.intervals:
        return value
    interval = found.intervals[score]
    return f"{value} [{interval.low:.4f}, {interval.high:.4f}]"
