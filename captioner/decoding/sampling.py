"""Captions that are drawn at random, word by word."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from captioner.config import DecodingOptions
from captioner.decoding.beam import Beams, Candidates, Choice
from captioner.decoding.step import Floats

Keys = npt.NDArray[np.uint64]


class Sampling:
    """Draws captions.

    The likelihood of a word is sharpened or flattened by the temperature, then narrowed to the `top_k` likeliest and
    to the nucleus (`top_p`; Holtzman et al. 2020), in this order. Log-probabilities are those of the model itself.

    The words that are drawn depend on the seed, the photo's features, the number of the sample and the position of
    the word, and on nothing else: not on the other photos of the batch, their order or their number.
    """

    groups = beams = quota = wanted = 1
    distinct = False

    def __init__(self, options: DecodingOptions, end: int, features: Floats) -> None:
        self.searches = options.num_captions
        self.count = options.top_k or None
        self.named = np.zeros(0, np.int64)
        self._options = options
        self._end = end
        samples = np.arange(self.searches, dtype=np.uint64)
        #: One number for each sample of each photo, `(searches,)`.
        self._keys = _mix(_mix(_hash(features) + np.uint64(options.seed))[:, None] + samples).ravel()

    def choose(self, candidates: Candidates, beams: Beams) -> Choice:
        """See the class."""
        rows = np.arange(len(candidates.logprob))
        top = candidates.logprob.max(axis=1)
        possible = top > -np.inf  # rows of the other kind draw nothing
        # Relative to the likeliest word that may come, since probabilities themselves may be too small for their type.
        likely = candidates.logprob - np.where(possible, top, np.float32(0))[:, None]
        likely /= np.float32(self._options.temperature)
        np.exp(likely, out=likely)
        reached = self._narrowed(likely).cumsum(axis=1)
        total = reached[:, -1]
        uniform = _uniform(self._keys[beams.search] + np.uint64(beams.time))
        # Strictly below the total, so that it falls on a word whose probability is not 0.
        target = np.minimum(uniform * total, total * np.float32(1 - 2**-22))
        drawn = (reached > target[:, None]).argmax(axis=1)

        word = candidates.word[drawn] if candidates.word.ndim == 1 else candidates.word[rows, drawn]
        logprob = np.where(possible, candidates.logprob[rows, drawn], np.float32(-np.inf)) + beams.logprob[:, 0]
        ends = word == self._end
        going, ended = np.where(ends, np.float32(-np.inf), logprob), np.where(ends, logprob, np.float32(-np.inf))
        return Choice(np.zeros_like(word)[:, None], word[:, None], going[:, None], ended[:, None])

    def _narrowed(self, likely: Floats) -> Floats:
        """Probabilities, up to a factor, of the words that may be drawn; 0 for the others."""
        if self.count is not None:  # the words are in order, but some of them may not come
            likely *= (likely > 0).cumsum(axis=1) <= self.count
        if self._options.top_p < 1:
            ordered = -np.sort(-likely, axis=1)
            reached = ordered.cumsum(axis=1)
            last = (reached >= np.float32(self._options.top_p) * reached[:, -1:]).argmax(axis=1)
            likely *= likely >= ordered[np.arange(len(last)), last][:, None]
        return likely


def _mix(x: Keys) -> Keys:
    """Scramble 64-bit integers: the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable generators")."""
    x = x * np.uint64(0x9E3779B97F4A7C15)  # the odd integer next to 2**64 over the golden ratio parts neighbours
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(keys: Keys) -> Floats:
    """Numbers in [0, 1), one for each key, in steps of 2**-24."""
    return (_mix(keys) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _hash(features: Floats) -> Keys:
    """64 bits that stand for a row's exact numbers, `(photos,)`: a weighted sum modulo 2**64."""
    bits = np.ascontiguousarray(features, np.float32).view(np.uint32).astype(np.uint64)
    places = _mix(np.arange(1, features.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    result: Keys = (_mix(bits) * places).sum(axis=1, dtype=np.uint64)
    return result
