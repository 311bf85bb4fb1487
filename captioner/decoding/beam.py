"""Beam search and diverse beam search: which captions are kept after each word.

A policy decides that for many searches at once. A search is the beam of a photo, or one sample of a photo. Its
captions stand side by side in a row of a grid, `(searches, captions)`; where the beam has groups, the captions of a
group are next to each other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from captioner.config import DecodingOptions
from captioner.decoding.step import Floats, Integers, largest


class Beams(NamedTuple):
    """The captions that are being written. Row r of a model's answer is place r of the flattened grid."""

    logprob: Floats  # (searches, captions): of all words so far; -inf in places that are empty
    search: Integers  # (searches,): the number of each search, by which a policy remembers what it needs
    time: int  # words that each caption has
    words: Integers  # (rows, max_words): these words, and after them nothing of meaning


class Candidates(NamedTuple):
    """The words that may follow each caption."""

    logprob: Floats  # (rows, words): -inf for words that may not come, or where the model has no probabilities
    word: Integers  # (rows, words) ids, likeliest first; or (words,), all words in the order of their ids
    named: Floats  # (rows, named): of the words that the policy named; they are not among the others


class Choice(NamedTuple):
    """The captions that are kept, each with one more word, and those that ended."""

    parent: Integers  # (searches, kept): the caption that was continued
    word: Integers  # (searches, kept): with this word
    logprob: Floats  # (searches, kept): of all words so far; -inf where there was nothing to keep
    ended: Floats  # (searches, captions): of each old caption and [end]; -inf where it did not end here


#: The log-probability of what cannot be.
NEVER = np.float32(-np.inf)


class Policy(Protocol):
    """Decides which captions are kept."""

    searches: int  # a photo
    groups: int  # a search
    beams: int  # captions a group, at most
    quota: int  # captions of a group that end before it is over
    wanted: int  # captions of a group, the best, that must not be missed
    distinct: bool  # whether a caption that was found twice counts once
    count: int | None  # likeliest words of each caption that are considered, beside the named ones; None: all words
    named: Integers  # ids of words that are always considered: [end] first, or none where it is one of the others

    def choose(self, candidates: Candidates, beams: Beams) -> Choice:
        """Choose the captions that go on, and those that end."""
        ...


class BeamSearch:
    """Keeps the likeliest captions; in groups, those that differ (Vijayakumar et al. 2018, "Diverse Beam Search").

    One step of a search with W beams: of all W x V continuations and all W endings the W likeliest are taken. The
    endings among them are captions found; the beam goes on with the W likeliest continuations. With groups, a
    continuation is ranked, among the others and the endings, as if `diversity` less likely for each earlier group that
    continues with that word now.
    """

    searches = 1
    distinct = True

    def __init__(self, options: DecodingOptions, end: int) -> None:
        self.groups = options.beam_groups
        self.beams = self.quota = options.width // options.beam_groups
        self.wanted = min(options.num_captions, self.beams)
        # The words of a caption that other groups make dearer are fewer than all beams, so more are never needed.
        self.count: int | None = options.width
        self.named = np.array([end])
        self._diversity = options.diversity

    def choose(self, candidates: Candidates, beams: Beams) -> Choice:
        """See the class."""
        searches, captions = beams.logprob.shape
        going = (beams.logprob.reshape(-1, 1) + candidates.logprob).reshape(searches, self.groups, -1)
        words = candidates.word.reshape(going.shape)
        ended = (beams.logprob + candidates.named.reshape(searches, captions)).reshape(searches, self.groups, -1)
        each = candidates.logprob.shape[1]  # words of a caption
        choices: list[Choice] = []
        for group in range(self.groups):
            penalty = self._diversity * _times_chosen(words[:, group], choices) if group else None
            choices.append(keep_best(going[:, group], words[:, group], ended[:, group], each, self.beams, penalty))
        if self.groups == 1:
            return choices[0]
        size = captions // self.groups
        parent = np.hstack([choice.parent + group * size for group, choice in enumerate(choices)])
        return Choice(parent, *(np.hstack(parts) for parts in list(zip(*choices, strict=True))[1:]))


def keep_best(
    going: Floats,
    words: Integers,
    ended: Floats,
    each: int,
    beams: int,
    penalty: Floats | None = None,
) -> Choice:
    """Keep the likeliest continuations, and the endings that are as likely.

    Args:
        going: log-probabilities of continuations, `(searches, captions * each)`.
        words: the words that they continue with.
        ended: log-probabilities of endings, `(searches, captions)`.
        each: continuations of a caption.
        beams: how many captions to keep.
        penalty: taken from the log-probabilities of continuations where they are compared.
    """
    rank = going if penalty is None else going - penalty
    best = largest(rank, beams)
    place = best + row_starts(*rank.shape)
    kept = going.take(place)
    ranked = kept if penalty is None else rank.take(place)
    return Choice(best // each, words.take(place), kept, among_best(ended, ranked, beams))


def among_best(ended: Floats, going: Floats, count: int) -> Floats:
    """Endings that are among the `count` best of themselves and the continuations; -inf in place of the others.

    Args:
        ended: log-probabilities of endings, `(searches, captions)`.
        going: of the best continuations, likeliest first.
        count: how many to keep.
    """
    if going.shape[1] >= count and not (ended >= going[:, -1:]).any():  # as mostly, where captions are few
        return ended + NEVER
    both = np.concatenate((going, ended), axis=1)
    last = both.shape[1] - count
    if last <= 0:
        return ended
    both.partition(last, axis=1)
    result: Floats = np.where(ended >= both[:, last, None], ended, NEVER)
    return result


@lru_cache(maxsize=256)
def row_starts(rows: int, columns: int) -> Integers:
    """Where the rows of an array begin in the flattened array, `(rows, 1)`."""
    starts = np.arange(rows)[:, None] * columns
    starts.flags.writeable = False
    return starts


def _times_chosen(words: Integers, choices: list[Choice]) -> Floats:
    """How many of the earlier groups of a search continue with each word, `(searches, words)`."""
    times: npt.NDArray[np.float32] = np.zeros(words.shape, np.float32)
    for choice in choices:
        chosen = np.where(choice.logprob > NEVER, choice.word, -1)
        times += (words[:, :, None] == chosen[:, None, :]).any(axis=2)
    return times
