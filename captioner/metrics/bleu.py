"""BLEU-1 to BLEU-4 (Papineni et al., ACL 2002) with the conventions of the COCO caption server (Chen et al. 2015).

The reference length of a caption is the closest one, the shorter of two that are equally close. Zeros are avoided
as the server avoids them: 1e-15 is added to the number of matches and of words, 1e-9 to what they are divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioner.metrics.ngrams import ORDERS, FloatArray, IntArray, Matches, ReferenceIndex

_TINY = 1e-15
_SMALL = 1e-9


@dataclass(frozen=True)
class BleuStatistics:
    """The counts that corpus BLEU is computed from; sums of rows are the statistics of a larger corpus."""

    correct: IntArray  # (captions, 4) n-grams that occur in a reference, clipped to their largest count in one
    guess: IntArray  # (captions, 4) n-grams in the caption
    length: IntArray  # (captions,) words in the caption
    reference_length: IntArray  # (captions,) words in the reference closest in length


def bleu_statistics(
    index: ReferenceIndex, images: IntArray, lengths: IntArray, matches: Sequence[Matches]
) -> BleuStatistics:
    """Collects the statistics of hypotheses whose n-grams were matched by `index.match(images, words, lengths)`."""
    correct = np.zeros((len(images), ORDERS), dtype=np.int64)
    for n, (found, reference) in enumerate(zip(matches, index.orders, strict=True)):
        hit = found.first < found.last
        if hit.any():
            # the matching spans do not overlap but have gaps: reduce over [first, last) pairs, keep the even results
            bounds = np.stack([found.first[hit], found.last[hit]], axis=1).reshape(-1)
            counts = np.append(reference.count, 0)
            largest = np.maximum.reduceat(counts, bounds)[::2]
            clipped = np.minimum(found.count[hit], largest)
            correct[:, n] = np.bincount(found.hypothesis[hit], weights=clipped, minlength=len(images))
    guess = np.maximum(lengths[:, None] - np.arange(ORDERS), 0)
    closest = np.empty(len(images), dtype=np.int64)
    for row, (image, length) in enumerate(zip(images.tolist(), lengths.tolist(), strict=True)):
        candidates = index.lengths[index.first_sentence[image] : index.first_sentence[image + 1]].tolist()
        closest[row] = min(candidates, key=lambda candidate: (abs(candidate - length), candidate))
    return BleuStatistics(correct, guess, lengths, closest)


def bleu_from_sums(
    correct: FloatArray, guess: FloatArray, length: FloatArray, reference_length: FloatArray
) -> FloatArray:
    """BLEU-1 to BLEU-4 of each row of (summed) statistics.

    Args:
        correct: (..., 4) clipped matches.
        guess: (..., 4) n-grams.
        length: (...) words in hypotheses.
        reference_length: (...) words in the closest references.

    Returns:
        (..., 4), each 0 to 1.
    """
    precision = (correct + _TINY) / (guess + _SMALL)
    mean = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    result: FloatArray = mean * penalty[..., None]
    return result


def corpus_bleu(statistics: BleuStatistics) -> FloatArray:
    """BLEU-1 to BLEU-4 of all captions together, (4,), each 0 to 1."""
    return bleu_from_sums(
        statistics.correct.sum(axis=0).astype(np.float64),
        statistics.guess.sum(axis=0).astype(np.float64),
        np.asarray(statistics.length.sum(), dtype=np.float64),
        np.asarray(statistics.reference_length.sum(), dtype=np.float64),
    )


def caption_bleu(statistics: BleuStatistics) -> FloatArray:
    """BLEU-1 to BLEU-4 of every caption by itself, (captions, 4), each 0 to 1."""
    return bleu_from_sums(
        statistics.correct.astype(np.float64),
        statistics.guess.astype(np.float64),
        statistics.length.astype(np.float64),
        statistics.reference_length.astype(np.float64),
    )
