"""CIDEr (Vedantam et al., CVPR 2015): how much a caption agrees with the consensus of its references.

pycocoevalcap's `Cider`, which papers publish as CIDEr, is CIDEr-D: counts are clipped to the reference's and a Gaussian
(sigma 6 words) punishes a difference in length. The paper's plain CIDEr has neither.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from captioner.metrics.idf import Idf
from captioner.metrics.ngrams import FloatArray, IntArray, Matches, ReferenceIndex, spans, sum_by

_SIGMA = 6.0
_SCALE = 10.0


class CiderD:
    """CIDEr-D with prepared references, fast enough to be the reward of self-critical training (Rennie et al. 2017).

    Args:
        references: tokenised references of each image. Tokens are anything hashable: words, or ids.
        idf: document frequencies to use in place of those of `references`; its tokens are words.

    Raises:
        ValueError: an image has no reference.
    """

    def __init__(self, references: Mapping[Any, Sequence[Sequence[Hashable]]], *, idf: Idf | None = None) -> None:
        self._weights = CiderWeights(ReferenceIndex(references, idf))

    def __call__(self, images: Sequence[Hashable], hypotheses: Sequence[Sequence[Hashable]]) -> FloatArray:
        """Scores hypotheses, any number of them per image.

        Args:
            images: the image of each hypothesis.
            hypotheses: their tokens, of the kind that the references have.

        Returns:
            (hypotheses,), 0 to 10.

        Raises:
            ValueError: an image is unknown, or the arguments differ in length.
        """
        if len(images) != len(hypotheses):
            raise ValueError(f"{len(images)} images for {len(hypotheses)} hypotheses; give one image per hypothesis")
        index = self._weights.index
        rows = np.array([index.find(image) for image in images], dtype=np.int64)
        words, lengths = index.number(hypotheses)
        return self._weights.score(rows, lengths, index.match(rows, words, lengths))


class CiderWeights:
    """The tf-idf vectors of prepared references.

    Args:
        index: the references, and the document frequencies.
    """

    def __init__(self, index: ReferenceIndex) -> None:
        self.index = index
        self._log_documents = float(np.log(max(1.0, index.documents)))
        self._idf: list[FloatArray] = []  # per order, of each n-gram of the index, and at the end of any other
        self._vectors: list[FloatArray] = []  # per order, of each entry of the index
        self._norms: list[FloatArray] = []  # per order, of each reference sentence
        for order in index.orders:
            weight = self._log_documents - np.log(np.maximum(1.0, order.document_frequency))
            ngram = order.place % max(len(order.keys), 1)
            vector = order.count * weight[ngram]
            self._idf.append(np.append(weight, self._log_documents))
            self._vectors.append(vector)
            self._norms.append(np.sqrt(sum_by(order.sentence, vector * vector, len(index.lengths))))

    def score(self, images: IntArray, lengths: IntArray, matches: Sequence[Matches]) -> FloatArray:
        """Scores hypotheses whose n-grams were matched by `index.match(images, words, lengths)`; (hypotheses,)."""
        index = self.index
        # a pair is a hypothesis with one reference of its image; pairs are numbered hypothesis by hypothesis
        pair_hypothesis, pair_reference = spans(index.first_sentence[images], index.first_sentence[images + 1])
        references = index.first_sentence[images + 1] - index.first_sentence[images]
        first_pair = np.cumsum(references) - references
        total = np.zeros(len(pair_hypothesis))
        for n, found in enumerate(matches):
            reference = index.orders[n]
            weight = self._idf[n]
            vector = found.count * weight[np.minimum(found.ngram, len(weight) - 1)]
            norm = np.sqrt(sum_by(found.hypothesis, vector * vector, len(images)))
            entry, position = spans(found.first, found.last)
            mine, theirs = vector[entry], self._vectors[n][position]
            product = np.minimum(mine, theirs) * theirs
            hypothesis = found.hypothesis[entry]
            pair = first_pair[hypothesis] + reference.sentence[position] - index.first_sentence[images[hypothesis]]
            similarity = sum_by(pair, product, len(total))
            scale = norm[pair_hypothesis] * self._norms[n][pair_reference]
            total += np.divide(similarity, scale, out=similarity, where=scale != 0)
        # the published code takes the number of bigrams for the length
        bigrams = np.maximum(lengths - 1, 0)[pair_hypothesis] - np.maximum(index.lengths - 1, 0)[pair_reference]
        total *= np.exp(-(bigrams.astype(np.float64) ** 2) / (2 * _SIGMA**2))
        sums = sum_by(pair_hypothesis, total, len(images))
        result: FloatArray = sums / len(matches) / references * _SCALE
        return result
