"""How sure a score is, and whether two systems differ.

Images are what is sampled. Intervals are percentile bootstrap intervals (Efron & Tibshirani 1993; Koehn, EMNLP 2004,
for corpus BLEU). The paired test is approximate randomisation (Noreen 1989; Riezler & Maxwell 2005): were the two
systems the same, the captions of any image could be swapped between them.

Corpus BLEU and METEOR are computed anew from the summed counts of every sample. CIDEr keeps the document frequencies of
the whole corpus (or of the given `Idf`): they belong to the metric, not to the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from captioner.metrics.bleu import bleu_from_sums
from captioner.metrics.meteor import PARAMETERS, STATISTICS, meteor_from_sums
from captioner.metrics.ngrams import ORDERS, FloatArray
from captioner.metrics.scoring import Scores

_BLEU = tuple(f"bleu_{n}" for n in range(1, ORDERS + 1))
_CHUNK = 1 << 21  # samples are drawn so many images at a time, which bounds the memory


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a score, or of a difference of scores."""

    low: float
    high: float
    confidence: float  # the share of such intervals that hold the true value, 0 to 1


@dataclass(frozen=True)
class Comparison:
    """One score of two systems on the same images."""

    difference: float  # the first system's score less the second's
    interval: Interval  # of the difference, by the paired bootstrap
    p_value: float  # of a difference at least as large were the systems the same; two-sided, never 0


def bootstrap_intervals(
    scores: Scores, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile bootstrap intervals over images, of every corpus score by name.

    Args:
        scores: what `evaluate` returned.
        resamples: how many samples of as many images, drawn with replacement.
        confidence: 0 to 1.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: a number is out of range.
    """
    _check(resamples, confidence)
    names, table, scores_of_sums = _statistics(scores)
    samples = np.concatenate([scores_of_sums(sums) for sums in _resampled([table], resamples, seed)[0]])
    return {name: _interval(samples[:, column], confidence) for column, name in enumerate(names)}


def paired_test(
    first: Scores, second: Scores, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Comparison]:
    """Compares two systems on the same images, for every corpus score by name.

    Args:
        first: what `evaluate` returned for one system.
        second: the same for the other, with the same references and document frequencies.
        resamples: how many random swaps for the p-value, whose smallest value is 1 / (resamples + 1), and how many
            bootstrap samples for the interval.
        confidence: of the interval, 0 to 1.
        seed: equal seeds give equal results.

    Raises:
        ValueError: the images or the scores differ, or a number is out of range.
    """
    _check(resamples, confidence)
    if set(first.ids) != set(second.ids):
        odd = next(iter(set(first.ids) ^ set(second.ids)))
        raise ValueError(f"the two systems were scored on different images, {odd!r} is in one only")
    task, other_task = (scores.meteor and scores.meteor.task for scores in (first, second))
    if task != other_task:
        raise ValueError("the two systems were not scored with the same METEOR; ask for the same of both")
    names, table, scores_of_sums = _statistics(first)
    row = {image: number for number, image in enumerate(second.ids)}
    other = _statistics(second)[1][[row[image] for image in first.ids]]
    observed = scores_of_sums(table.sum(axis=0)) - scores_of_sums(other.sum(axis=0))

    bootstrap = _resampled([table, other], resamples, seed)
    differences = np.concatenate(
        [scores_of_sums(one) - scores_of_sums(two) for one, two in zip(*bootstrap, strict=True)]
    )
    extreme = np.zeros(len(names))
    random = np.random.default_rng(seed)
    exchange = other - table
    total = table.sum(axis=0), other.sum(axis=0)
    for size in _chunks(resamples, len(table)):
        swapped = random.integers(0, 2, size=(size, len(table)), dtype=np.int8).astype(np.float64) @ exchange
        chance = scores_of_sums(total[0] + swapped) - scores_of_sums(total[1] - swapped)
        extreme += (np.abs(chance) >= np.abs(observed) - 1e-12).sum(axis=0)
    return {
        name: Comparison(
            float(observed[column]),
            _interval(differences[:, column], confidence),
            float((extreme[column] + 1) / (resamples + 1)),
        )
        for column, name in enumerate(names)
    }


def _statistics(scores: Scores) -> tuple[list[str], FloatArray, Callable[[FloatArray], FloatArray]]:
    """The names of the scores, what to sum over images to get them, (images, statistics), and how to get them.

    The statistics are one column of ones, one per score that is a mean, ten for BLEU, and those of METEOR, if any.
    """
    bleu, meteor = scores.bleu, scores.meteor
    means = [name for name in scores.corpus if name not in _BLEU and not (name == "meteor" and meteor)]
    table = np.column_stack(
        [
            np.ones(len(scores.ids)),
            *(scores.per_image[name] for name in means),
            bleu.correct,
            bleu.guess,
            bleu.length,
            bleu.reference_length,
            *([meteor.summable()] if meteor else []),
        ]
    )
    first = 1 + len(means)

    def scores_of_sums(sums: FloatArray) -> FloatArray:
        """Corpus scores, (..., names), from summed statistics, (..., statistics)."""
        correct, guess, rest = np.split(sums[..., first:], [ORDERS, 2 * ORDERS], axis=-1)
        found = [bleu_from_sums(correct, guess, rest[..., 0], rest[..., 1]), sums[..., 1:first] / sums[..., :1]]
        if meteor:
            found.append(meteor_from_sums(sums[..., -STATISTICS:], PARAMETERS[meteor.task])[..., None])
        return np.concatenate(found, axis=-1)

    return [*_BLEU, *means, *(["meteor"] if meteor else [])], table.astype(np.float64), scores_of_sums


def _chunks(resamples: int, images: int) -> Iterator[int]:
    most = max(1, _CHUNK // images)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)


def _resampled(tables: list[FloatArray], resamples: int, seed: int) -> list[list[FloatArray]]:
    """The sums of bootstrap samples of the same images in each table, in chunks of samples."""
    random = np.random.default_rng(seed)
    images = len(tables[0])
    sums: list[list[FloatArray]] = [[] for _ in tables]
    for size in _chunks(resamples, images):
        drawn = random.integers(0, images, size=(size, images))
        drawn += np.arange(size)[:, None] * images
        times = np.bincount(drawn.reshape(-1), minlength=size * images).reshape(size, images).astype(np.float64)
        for table, sampled in zip(tables, sums, strict=True):
            sampled.append(times @ table)
    return sums


def _interval(samples: FloatArray, confidence: float) -> Interval:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence)


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; draw at least one")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95")
