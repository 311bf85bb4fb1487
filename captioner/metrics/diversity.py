"""Measures of captions alone, without references: their variety, their length, the share copied from training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from captioner.metrics.tokenization import tokenize_all


@dataclass(frozen=True)
class Diversity:
    """Statistics of a set of captions; shares and distinct-n are 0 to 1."""

    captions: int  # how many there are
    mean_length: float  # words per caption
    distinct_1: float  # different words / words (Li et al., NAACL 2016)
    distinct_2: float  # different pairs of neighbouring words / pairs
    vocabulary: int  # different words
    unique: float  # different captions / captions
    in_training: float | None  # share that equals a caption of the training set; None where that was not given
    truncated: float | None  # share that ended without `[end]`; None where that was not given


def diversity(
    captions: Sequence[str], *, training: Iterable[str] | None = None, truncated: Sequence[bool] | None = None
) -> Diversity:
    """Describes a set of generated captions. Captions are compared as tokens: without case and punctuation.

    Args:
        captions: raw captions, one per image.
        training: raw captions of the training set.
        truncated: for each caption, whether it was cut off before the model wrote `[end]`.

    Raises:
        ValueError: there are no captions, or not one flag per caption.
    """
    if not captions:
        raise ValueError("there are no captions to describe")
    if truncated is not None and len(truncated) != len(captions):
        raise ValueError(f"{len(truncated)} flags for {len(captions)} captions; give one flag per caption")
    sentences = [tuple(tokens) for tokens in tokenize_all(captions)]
    words = [word for sentence in sentences for word in sentence]
    pairs = [pair for sentence in sentences for pair in pairwise(sentence)]
    known = None if training is None else {tuple(tokens) for tokens in tokenize_all(list(training))}
    return Diversity(
        captions=len(sentences),
        mean_length=len(words) / len(sentences),
        distinct_1=len(set(words)) / max(1, len(words)),
        distinct_2=len(set(pairs)) / max(1, len(pairs)),
        vocabulary=len(set(words)),
        unique=len(set(sentences)) / len(sentences),
        in_training=None if known is None else sum(sentence in known for sentence in sentences) / len(sentences),
        truncated=None if truncated is None else sum(map(bool, truncated)) / len(truncated),
    )
