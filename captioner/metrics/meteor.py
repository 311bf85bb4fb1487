"""METEOR 1.5 (Denkowski & Lavie, WMT 2014) for English without Java, equal to `meteor-1.5.jar -l en -norm`.

Words of the hypothesis are matched with words of a reference, exactly, by stem, by synonym or by paraphrase. P is the
weighted share of the hypothesis that is matched and R that of the reference, Fmean = 1 / ((1 - alpha) / P + alpha / R),
and the score is Fmean (1 - gamma (chunks / matches)^beta). The best reference counts; the score of a corpus comes from
the summed statistics of its captions, and is not their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from captioner.metrics import meteor_index
from captioner.metrics.meteor_alignment import Hypothesis, Sentence, Word, align, candidates
from captioner.metrics.meteor_words import java_hash, normaliser
from captioner.metrics.ngrams import FloatArray

Task = Literal["rank", "adq", "hter"]

_SEPARATOR = "|||"  # of captions on the jar's input, from which it cannot be told when a caption holds it
_KINDS = 4
_TOGETHER = 256  # images that are matched together, which bounds the memory
_KEPT = 1 << 20  # paraphrases that are kept ready in memory


@dataclass(frozen=True)
class Parameters:
    """The weights of the score."""

    alpha: float  # of recall against precision, 0 to 1
    beta: float  # how steeply chunks are punished
    gamma: float  # how much chunks are punished at most, 0 to 1
    delta: float  # of content words; function words weigh 1 - delta
    weights: tuple[float, float, float, float]  # of matches: exact, stem, synonym, paraphrase


PARAMETERS: dict[Task, Parameters] = {
    "rank": Parameters(0.85, 0.20, 0.60, 0.75, (1.0, 0.6, 0.8, 0.6)),
    "adq": Parameters(0.75, 1.40, 0.45, 0.70, (1.0, 1.0, 0.6, 0.8)),
    "hter": Parameters(0.40, 1.50, 0.35, 0.55, (1.0, 0.2, 0.6, 0.8)),
}
"""Tuned on people's rankings (the default of the jar and of COCO), on their ratings of adequacy, and on HTER."""

STATISTICS = 4 + 4 * _KINDS + 3
"""Numbers a caption, in the order of the jar, in pairs for the hypothesis and for the reference: words; function words;
for each kind of match the content words matched and the function words matched; chunks (one number); words matched."""


@dataclass(frozen=True)
class MeteorStatistics:
    """The counts that METEOR is computed from; sums of rows are the statistics of a larger corpus."""

    counts: FloatArray  # (captions, STATISTICS) of each hypothesis with its best reference
    task: Task

    def per_caption(self) -> FloatArray:
        """The score of each caption, (captions,), 0 to 1."""
        return meteor_from_sums(self.summable(), PARAMETERS[self.task])

    def corpus(self) -> float:
        """The score of all captions together, 0 to 1."""
        return float(meteor_from_sums(self.summable().sum(axis=0), PARAMETERS[self.task]))

    def summable(self) -> FloatArray:
        """The counts as the jar sums them: captions that are matched completely and in one chunk count none."""
        counts = self.counts.copy()
        complete = (counts[:, 0] == counts[:, -2]) & (counts[:, 1] == counts[:, -1]) & (counts[:, -3] == 1)
        counts[complete, -3] = 0
        return counts


def meteor_from_sums(counts: FloatArray, parameters: Parameters) -> FloatArray:
    """METEOR of each row of (summed) statistics, see `MeteorStatistics.summable`.

    Args:
        counts: (..., STATISTICS).
        parameters: the weights.

    Returns:
        (...), each 0 to 1.
    """
    delta = parameters.delta
    matched = counts[..., 4:-3].reshape(
        *counts.shape[:-1], _KINDS, 2, 2
    )  # kind, content or function, hypothesis or reference
    weights = np.array(parameters.weights)
    shares = []
    for side in range(2):
        words, function = counts[..., side], counts[..., 2 + side]
        of_kind = delta * matched[..., 0, side] + (1 - delta) * matched[..., 1, side]
        whole = delta * (words - function) + (1 - delta) * function
        shares.append(_ratio(of_kind @ weights, whole))
    precision, recall = shares
    alpha = parameters.alpha
    # 1 / ((1 - alpha) / P + alpha / R), written so that it is 0 where either is
    mean = _ratio(precision * recall, (1 - alpha) * recall + alpha * precision)
    fragmentation = _ratio(counts[..., -3], (counts[..., -2] + counts[..., -1]) / 2)
    result: FloatArray = mean * (1 - parameters.gamma * fragmentation**parameters.beta)
    return result


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    """A ratio, 0 where it is of nothing."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below != 0)


class Meteor:
    """METEOR with its data in memory.

    Args:
        index: what `meteor_index.load` returned.
        task: what the weights were tuned on, see `PARAMETERS`.

    Raises:
        ValueError: nltk, whose stemmer is needed, is not installed.
    """

    def __init__(self, index: meteor_index.Index, task: Task = "rank") -> None:
        if task not in PARAMETERS:
            raise ValueError(f"there is no METEOR for {task!r}; there are {', '.join(PARAMETERS)}")
        self.task = task
        self._index = index
        self._normalise = normaliser(index.prefixes)
        self._stem = _stemmer()
        self._words: dict[str, Word] = {}
        self._paraphrases: dict[int, dict[int, int]] = {}
        self._kept = 0

    @classmethod
    def load(cls, task: Task = "rank", *, progress: Callable[[int, int], None] | None = None) -> Meteor:
        """Reads the data; the first time on a machine they are indexed, which takes some ten seconds.

        Args:
            task: what the weights were tuned on, see `PARAMETERS`.
            progress: called with the bytes indexed so far and in all.

        Raises:
            ValueError: pycocoevalcap or nltk is not installed, the data are damaged, or the cache cannot be written.
        """
        return cls(meteor_index.load(progress), task)

    def statistics(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> MeteorStatistics:
        """Matches each hypothesis with its references, and keeps the best of them.

        Args:
            references: one or more captions of each image, tokenised as for the other scores and joined by spaces, or
                any text on one line.
            hypotheses: the caption to score of each image, likewise.
        """
        best = [
            self._best(references[start : start + _TOGETHER], hypotheses[start : start + _TOGETHER])
            for start in range(0, len(hypotheses), _TOGETHER)
        ]
        return MeteorStatistics(np.concatenate([np.zeros((0, STATISTICS)), *best]), self.task)

    def _best(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> FloatArray:
        """The statistics of each hypothesis with its best reference, of equals the first."""
        lines: list[str] = []  # those of an image in a row, its hypothesis last
        ends: list[int] = []
        for texts, caption in zip(references, hypotheses, strict=True):
            # the line that pycocoevalcap writes for the jar, and how the jar reads it
            written = caption.replace(_SEPARATOR, "").replace("  ", " ")
            lines += f" {_SEPARATOR} ".join([*texts, written]).split(_SEPARATOR)
            ends.append(len(lines))
        words = [self._normalise(line) for line in lines]
        phrases = self._index.phrases(words)
        rows: list[list[int]] = []
        first = [0]
        for start, end in zip([0, *ends], ends, strict=False):
            hypothesis = Hypothesis([self._word(word) for word in words[end - 1]], phrases[end - 1])
            for line in range(start, end - 1):
                reference = Sentence([self._word(word) for word in words[line]], phrases[line])
                rows.append(self._compare(hypothesis, reference))
            first.append(len(rows))
        counts = np.array(rows, dtype=np.float64).reshape(-1, STATISTICS)
        scores = MeteorStatistics(counts, self.task).per_caption()
        return counts[[low + int(scores[low:high].argmax()) for low, high in pairwise(first)]]

    def _word(self, word: str) -> Word:
        known = self._words.get(word)
        if known is None:
            function = word in self._index.function
            known = Word(java_hash(word), java_hash(self._stem(word)), self._index.synsets(word), function)
            self._words[word] = known
        return known

    def _places(self, phrase: int) -> dict[int, int]:
        """The paraphrases of a phrase, each with its place in the table."""
        known = self._paraphrases.get(phrase)
        if known is None:
            if self._kept > _KEPT:
                self._paraphrases.clear()
                self._kept = 0
            known = {number: place for place, number in enumerate(self._index.paraphrases(phrase).tolist())}
            self._paraphrases[phrase] = known
            self._kept += len(known)
        return known

    def _compare(self, hypothesis: Hypothesis, reference: Sentence) -> list[int]:
        """The statistics of a hypothesis with one reference."""
        matches = align(candidates(hypothesis, reference, self._places), len(hypothesis.words))
        row = [0] * STATISTICS
        row[0], row[1] = len(hypothesis.words), len(reference.words)
        row[2] = sum(word.function for word in hypothesis.words)
        row[3] = sum(word.function for word in reference.words)
        neighbours = (-1, -1)
        for kind, place, words, other, other_words in matches:
            at = 4 + 4 * kind
            for word in hypothesis.words[other : other + other_words]:
                row[at + 2 * word.function] += 1
            for word in reference.words[place : place + words]:
                row[at + 1 + 2 * word.function] += 1
            row[-3] += (place, other) != neighbours
            row[-2] += other_words
            row[-1] += words
            neighbours = (place + words, other + other_words)
        return row


def _stemmer() -> Callable[[str], str]:
    """The Porter2 stemmer of NLTK, which gives the stems that the jar gives."""
    try:
        from nltk.stem.snowball import EnglishStemmer
    except ImportError:
        raise ValueError(
            "meteor needs the stemmer of nltk, which is not installed; install it: pip install 'captioner[meteor]'"
        ) from None
    stem: Callable[[str], str] = EnglishStemmer().stem
    return stem
