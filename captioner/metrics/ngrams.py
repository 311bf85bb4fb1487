"""N-grams as integers: references are indexed once, hypotheses are matched against them in bulk.

BLEU and CIDEr ask the same questions: how often does each n-gram occur in this hypothesis, and in which references
of the same image does it occur? Here an n-gram is an integer, so that thousands of captions are answered by a few
sorts and binary searches instead of millions of dictionary look-ups.

The number of an n-gram is its row in a sorted table of keys `prefix * base + word`, in which `prefix` is the number of
the n-gram without its last word. An n-gram that the table lacks gets a number behind the end of the table.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from captioner.metrics.idf import Idf

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

ORDERS = 4
"""The longest n-gram that BLEU-4 and CIDEr look at."""

BASE = 1 << 32
"""Words are numbered below this, and n-grams below 2**31, so that a key fits 64 bits."""


@dataclass(frozen=True)
class Matches:
    """The n-grams of one length in a batch of hypotheses, and where the references have them."""

    hypothesis: IntArray  # (entries,) row of the hypothesis in the batch
    ngram: IntArray  # (entries,) number of the n-gram
    count: IntArray  # (entries,) how often it occurs in the hypothesis, >= 1
    first: IntArray  # (entries,) the occurrences in references of the same image are `first` to `last` - 1 of
    last: IntArray  # (entries,) `ReferenceNgrams.sentence` and `.count`; equal to `first` where there is none


@dataclass(frozen=True)
class ReferenceNgrams:
    """The n-grams of one length in all references, sorted by image and n-gram."""

    keys: IntArray  # (ngrams,) sorted keys of the distinct n-grams; the row is the number of the n-gram
    document_frequency: IntArray  # (ngrams,) in how many images' references each occurs; with an idf, there
    place: IntArray  # (entries,) sorted `image * len(keys) + ngram`, once per reference that has the n-gram
    sentence: IntArray  # (entries,) the reference, numbered through all images
    count: IntArray  # (entries,) how often the reference has it, >= 1


def concatenate(sentences: Iterable[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Puts sentences one after another.

    Returns:
        The words, (total,), and the number of words of each sentence, (sentences,).
    """
    words: list[int] = []
    lengths: list[int] = []
    for sentence in sentences:
        words.extend(sentence)
        lengths.append(len(sentence))
    return np.array(words, dtype=np.int64), np.array(lengths, dtype=np.int64)


def _starts(lengths: IntArray, n: int) -> tuple[IntArray, IntArray]:
    """Where n-grams start: positions in the concatenated words, and the sentence of each."""
    sentence = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    ends = np.repeat(np.cumsum(lengths), lengths)
    position = np.arange(len(sentence), dtype=np.int64)
    inside = position + n <= ends
    return position[inside], sentence[inside]


def _count_equal(ordered: IntArray) -> tuple[IntArray, IntArray]:
    """The distinct values of a sorted array, and how often each occurs."""
    first = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    start = np.flatnonzero(first)
    return ordered[start], np.diff(start, append=len(ordered))


class ReferenceIndex:
    """The references of a set of images, prepared for counting matches with any number of hypotheses.

    Args:
        references: tokenised references of each image; tokens are anything hashable, strings or ids.
        idf: document frequencies of another corpus, to be used in place of those of `references`.

    Raises:
        ValueError: an image has no reference.
    """

    def __init__(self, references: Mapping[Any, Sequence[Sequence[Hashable]]], idf: Idf | None = None) -> None:
        empty = [image for image, sentences in references.items() if not len(sentences)]
        if empty:
            raise ValueError(f"image {empty[0]!r} has no reference; every image needs at least one")
        self.rows: dict[Hashable, int] = {image: row for row, image in enumerate(references)}
        self.documents = idf.images if idf else len(references)  # images that the document frequencies are of
        number: dict[Hashable, int] = {word: row for row, word in enumerate(idf.words)} if idf else {}
        self.vocabulary = number
        words, self.lengths = concatenate(
            [number.setdefault(token, len(number)) for token in sentence]
            for sentences in references.values()
            for sentence in sentences
        )
        per_image = np.array([len(sentences) for sentences in references.values()], dtype=np.int64)
        self.first_sentence: IntArray = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(per_image)])
        image_of_sentence = np.repeat(np.arange(len(per_image), dtype=np.int64), per_image)
        widest = max(1, int(per_image.max())) if len(per_image) else 1
        self.orders: list[ReferenceNgrams] = []
        prefix = np.zeros(len(words) + 1, dtype=np.int64)  # number of the (n-1)-gram that starts at each word
        renumbered = np.zeros(1, dtype=np.int64)  # our number of each (n-1)-gram of the idf
        for n in range(1, ORDERS + 1):
            start, sentence = _starts(self.lengths, n)
            known = idf.keys[n - 1] if idf else np.zeros(0, dtype=np.int64)
            known = renumbered[known // BASE] * BASE + known % BASE
            keys, ngram = np.unique(
                np.concatenate([known, prefix[start] * BASE + words[start + n - 1]]), return_inverse=True
            )
            renumbered, ngram = np.split(ngram.astype(np.int64).reshape(-1), [len(known)])
            prefix = np.full(len(words) + 1, -1, dtype=np.int64)
            prefix[start] = ngram
            size = max(len(keys), 1)
            # one sort by image, n-gram and reference; equal neighbours are occurrences in the same reference
            image = image_of_sentence[sentence]
            entry = (image * size + ngram) * widest + (sentence - self.first_sentence[image])
            entry, count = _count_equal(np.sort(entry))
            place = entry // widest
            sentence = self.first_sentence[place // size] + entry % widest
            if idf:
                frequency = np.zeros(len(keys), dtype=np.int64)
                frequency[renumbered] = idf.frequency[n - 1]
            else:
                frequency = np.bincount(_count_equal(place)[0] % size, minlength=len(keys)).astype(np.int64)
            self.orders.append(ReferenceNgrams(keys, frequency, place, sentence, count))

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, image: Hashable) -> int:
        """The row of an image.

        Raises:
            ValueError: there are no references for it.
        """
        try:
            return self.rows[image]
        except KeyError:
            raise ValueError(f"image {image!r} has no references; known are the {len(self)} images given") from None

    def match(self, images: IntArray, words: IntArray, lengths: IntArray) -> list[Matches]:
        """Counts the n-grams of hypotheses and finds them in the references of their images.

        Args:
            images: (hypotheses,) row of the image of each hypothesis.
            words: (total,) the hypotheses' words one after another, see `number`.
            lengths: (hypotheses,) words of each hypothesis.

        Returns:
            One `Matches` for each length of n-gram, 1 to 4.
        """
        found: list[Matches] = []
        prefix = np.zeros(len(words) + 1, dtype=np.int64)
        for n, reference in enumerate(self.orders, start=1):
            start, sentence = _starts(lengths, n)
            ngram = look_up(reference.keys, prefix[start] * BASE + words[start + n - 1])
            prefix = np.full(len(words) + 1, -1, dtype=np.int64)
            prefix[start] = ngram
            size = int(ngram.max()) + 1 if len(ngram) else 1
            entry, count = _count_equal(np.sort(sentence * size + ngram))
            sentence, ngram = entry // size, entry % size
            known = ngram < len(reference.keys)
            place = np.where(known, images[sentence] * max(len(reference.keys), 1) + ngram, -1)
            first = np.searchsorted(reference.place, place, side="left").astype(np.int64)
            last = np.searchsorted(reference.place, place, side="right").astype(np.int64)
            found.append(Matches(sentence, ngram, count, first, last))
        return found

    def number(self, hypotheses: Iterable[Sequence[Hashable]]) -> tuple[IntArray, IntArray]:
        """Turns tokens into numbers; words that no reference has are numbered behind the vocabulary.

        Returns:
            What `concatenate` returns.
        """
        known = self.vocabulary
        new: dict[Hashable, int] = {}
        offset = len(known)
        sentences: list[list[int]] = []
        for tokens in hypotheses:
            numbers = [known.get(token, -1) for token in tokens]
            if -1 in numbers:
                numbers = [
                    new.setdefault(token, offset + len(new)) if number < 0 else number
                    for number, token in zip(numbers, tokens, strict=True)
                ]
            sentences.append(numbers)
        return concatenate(sentences)


def look_up(keys: IntArray, wanted: IntArray) -> IntArray:
    """The row of each wanted key in sorted `keys`; equal missing keys get equal numbers from `len(keys)` on."""
    row = np.searchsorted(keys, wanted).astype(np.int64)
    missing = np.ones(len(wanted), dtype=np.bool_)
    inside = row < len(keys)
    missing[inside] = keys[row[inside]] != wanted[inside]
    if missing.any():
        _, new = np.unique(wanted[missing], return_inverse=True)
        row[missing] = len(keys) + new.astype(np.int64).reshape(-1)
    return row


def spans(first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
    """All (row, position) with `first[row] <= position < last[row]`, rows in order."""
    lengths = last - first
    row = np.repeat(np.arange(len(first), dtype=np.int64), lengths)
    offset = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return row, np.repeat(first, lengths) + np.arange(len(row), dtype=np.int64) - offset


def sum_by(group: IntArray, values: FloatArray, groups: int) -> FloatArray:
    """The sum of the values of each group, (groups,)."""
    return np.bincount(group, weights=values, minlength=groups).astype(np.float64, copy=False)
