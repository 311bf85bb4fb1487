"""The page that compares two runs, photo by photo."""

from __future__ import annotations

from typing import NamedTuple

from captioner import evaluation
from captioner.config import Statistics, differences
from captioner.datasets.formats import ImageId
from captioner.errors import CaptionerError
from captioner.evaluation import Evaluation
from captioner.metrics import Comparison
from captioner.report.page import SCORES, Card, Thumbnails, card, charts, render, status
from captioner.report.run import Run

_EXTREMES = 8  # photos with the biggest wins, and as many with the biggest losses
_MOST_PAIRS = 1000  # rows of the table of photos


class Row(NamedTuple):
    """A score of both runs."""

    name: str
    values: tuple[float, float]
    test: Comparison | None  # of the first less the second; None where no test was asked for


class Pair(NamedTuple):
    """A photo with the captions of both runs."""

    image_id: ImageId
    captions: tuple[str, str]
    cider: tuple[float, float]

    @property
    def difference(self) -> float:
        """CIDEr of the first run less that of the second."""
        return self.cider[0] - self.cider[1]


def comparison(first: Run, second: Run, statistics: Statistics) -> str:
    """The page of two runs; the captions of their best epochs are compared.

    Args:
        first: a run.
        second: another one.
        statistics: of the paired test.

    Raises:
        CaptionerError: the runs share no validation photo, or a file of a run is damaged.
        ModuleNotFoundError: jinja2 is not installed.
    """
    names = (first.name, second.name) if first.name != second.name else (str(first.folder), str(second.folder))
    evaluations = _evaluations(first, second)
    pairs = sorted(_pairs(*evaluations), key=lambda pair: pair.difference, reverse=True)
    tests = evaluation.compare(*evaluations, statistics) if statistics.resamples else {}
    scores = [found.scores.corpus for found in evaluations]
    rows = [
        Row(SCORES[name], (scores[0][name], scores[1][name]), tests.get(name)) for name in SCORES if name in scores[0]
    ]
    thumbnails = Thumbnails()

    def cards(chosen: list[Pair]) -> list[Card]:
        return [
            card(
                first.photos[pair.image_id],
                [(f"{names[run]} {pair.cider[run]:.2f}", pair.captions[run]) for run in (0, 1)],
                thumbnails,
            )
            for pair in chosen
        ]

    better = [pair for pair in pairs if pair.difference > 0]
    worse = [pair for pair in reversed(pairs) if pair.difference < 0]
    return render(
        "comparison.html",
        title=f"{names[0]} against {names[1]}",
        names=names,
        runs=(first, second),
        statuses=(status(first), status(second)),
        photos=len(pairs),
        left_out=len(first.photos.keys() | second.photos.keys()) - len(pairs),
        rows=rows,
        confidence=statistics.confidence,
        resamples=statistics.resamples,
        counts=(len(better), len(worse), len(pairs) - len(better) - len(worse)),
        charts=charts([(names[0], first), (names[1], second)]),
        wins=cards(better[:_EXTREMES]),
        losses=cards(worse[:_EXTREMES]),
        photos_missing=thumbnails.said,
        pairs=[
            (first.photos[pair.image_id], pair)
            for pair in sorted(pairs, key=lambda pair: abs(pair.difference), reverse=True)[:_MOST_PAIRS]
        ],
        settings={
            name: pair for name, pair in differences(first.settings, second.settings).items() if name != "output"
        },
    )


def _evaluations(first: Run, second: Run) -> tuple[Evaluation, Evaluation]:
    """The best captions of both runs, scored on the photos that both have with the same human captions.

    Raises:
        CaptionerError: a run has no captions yet, or there is no such photo.
    """
    for run in (first, second):
        if not run.photos or not run.captions(run.best_epoch):
            raise CaptionerError(
                f"{run.folder}: has no validation captions on record; wait for its first validation, or train it anew"
            )
    shared = {
        image_id: photo.captions
        for image_id, photo in first.photos.items()
        if image_id in second.photos and second.photos[image_id].captions == photo.captions
    }
    if not shared:
        raise CaptionerError(
            f"{first.folder} and {second.folder} have no validation photo in common; compare runs on the same data"
        )
    references = evaluation.References(shared)

    def evaluated(run: Run) -> Evaluation:
        captions = {image_id: caption.text for image_id, caption in run.captions(run.best_epoch).items()}
        chosen = {image_id: captions[image_id] for image_id in shared if image_id in captions}
        return evaluation.evaluate(
            references, evaluation.Hypotheses(chosen, {}), evaluation.Measures(statistics=Statistics(resamples=0))
        )

    return evaluated(first), evaluated(second)


def _pairs(first: Evaluation, second: Evaluation) -> list[Pair]:
    ciders = zip(first.scores.per_image["cider"], second.scores.per_image["cider"], strict=True)
    one, two = first.hypotheses.captions, second.hypotheses.captions
    return [
        Pair(image_id, (one[image_id], two[image_id]), (float(a), float(b)))
        for image_id, (a, b) in zip(first.references.captions, ciders, strict=True)
    ]
