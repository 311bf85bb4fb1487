"""The search for captions, over any `StepModel`.

One loop writes the captions of many photos at once, word by word (`search`). A policy decides which captions are kept
after each word: beam search in `beam.py`, sampling in `sampling.py`, required words in `constraints.py`. Captions that
are over are collected, and ranked at the end.

Log-probabilities are the model's own: natural logs of a softmax over the whole vocabulary, with `[pad]`, `[start]`
and `[unk]` in it although they are never written.
"""

from __future__ import annotations

import math
from bisect import insort
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from captioner.config import DecodingOptions
from captioner.decoding.beam import NEVER, Beams, BeamSearch, Candidates, Choice, Policy, row_starts
from captioner.decoding.constraints import ConstrainedBeamSearch, Rules, SpecialTokens, forbidden_ids
from captioner.decoding.sampling import Sampling
from captioner.decoding.step import Floats, Integers, StepModel, largest

__all__ = ["Hypothesis", "SpecialTokens", "StepModel", "decode"]

_ROWS = 256  # captions that are written at once: enough to keep a model busy, few enough for a processor's cache
_ROWS_WORKER = 64  # as many are worth a worker of their own


@dataclass(frozen=True)
class Hypothesis:
    """A caption that the search found."""

    tokens: tuple[int, ...]  # ids of the words, without [start] and [end]
    logprob: float  # natural log of the probability of the words (and of [end], where it was found)
    score: float  # the number that hypotheses are ranked by: logprob after length normalisation
    finished: bool  # ended with [end], rather than cut at max_words or because no word could follow
    satisfied: bool = True  # has every required word


class Step(NamedTuple):
    """The choice that a search made at one word."""

    beams: Beams  # the captions that were to be continued
    choice: Choice  # the captions that were kept, and those that ended
    #: Log-probabilities of the likeliest words to follow each caption, and their ids, `(searches, captions, words)`.
    logprob: Floats
    word: Integers


def decode(
    model: StepModel, features: Floats, special: SpecialTokens, options: DecodingOptions, workers: int = 1
) -> list[list[Hypothesis]]:
    """Write captions.

    A model whose logits give no probabilities (NaN among them, or all of them -inf) cuts the caption there, and every
    photo still gets one, if need be an empty one. The captions of a photo depend neither on the other photos, nor on
    their order, nor on `workers`.

    Args:
        model: an engine, or an `Ensemble`.
        features: the vectors that the encoder made of the photos, `(photos, 4096)`.
        special: the vocabulary, or only the ids of its special tokens where the options name no words.
        options: how to search.
        workers: threads that search at once; each asks the model for photos of its own.

    Returns:
        For every photo its captions, best first: `options.num_captions` of them, or fewer where there are no more or
        groups of the beam find the same.

    Raises:
        CaptionerError: the options name words that cannot be used as asked.
    """
    features = np.asarray(features, np.float32)
    policy = _policy(options, special, features[:0])
    forbidden_ids(special, options)  # refused even where there is no photo, as the policy refuses required words
    photos = len(features)
    rows = photos * policy.searches * policy.groups * policy.beams
    count = math.ceil(rows / _ROWS)
    if workers > 1:  # as many parts for each
        count = min(math.ceil(count / workers) * workers, math.ceil(rows / _ROWS_WORKER))
    parts = np.array_split(features, min(count, photos)) if count > 1 else [features][:photos]

    def write(some: Floats) -> list[list[Hypothesis]]:
        captions, _ = search(model, some, special, options)
        missed = [number for number, found in enumerate(captions) if not found[0].satisfied]
        if missed:
            for number, found in zip(missed, relaxed(model, some[missed], special, options)[0], strict=True):
                captions[number] = found
        return captions

    if workers < 2 or len(parts) < 2:
        return [captions for part in parts for captions in write(part)]
    with ThreadPoolExecutor(min(workers, len(parts))) as pool:
        return [captions for written in pool.map(write, parts) for captions in written]


def search(
    model: StepModel, features: Floats, special: SpecialTokens, options: DecodingOptions, watch: bool = False
) -> tuple[list[list[Hypothesis]], list[Step]]:
    """Write the captions of a batch, all at once.

    Args:
        model: gives the probabilities of words.
        features: `(photos, 4096)`.
        special: the vocabulary, or only the ids of its special tokens.
        options: how to search.
        watch: keep the likeliest words of every caption at every step, whether or not they were chosen.

    Returns:
        For every photo its captions, best first, and the steps of the search.
    """
    photos = len(features)
    policy = _policy(options, special, features)
    rules = Rules(options, special, policy, model.vocabulary_size)
    found = _Found(options, policy, photos)
    count = max(policy.count, policy.beams + 1) if watch and policy.count is not None else policy.count

    # Every search begins with a caption of no words, or one in each group.
    searches, rows = photos * policy.searches, photos * policy.searches * policy.groups
    logprob: Floats = np.zeros((searches, policy.groups), np.float32)
    beams = Beams(logprob, np.arange(searches), 0, np.zeros((rows, options.max_words), np.int64))
    tokens = np.full(rows, special.start)
    parents = np.arange(rows) // (policy.searches * policy.groups)
    state = model.start(features)
    steps: list[Step] = []
    while len(beams.search) and beams.time < options.max_words:
        candidates, state = rules.ask(model, tokens, parents, state, count, beams)
        choice = policy.choose(candidates, beams)
        if watch:
            steps.append(Step(beams, choice, *_considered(candidates, policy.named, beams, policy.beams + 1)))
        logprob, going = found.follow(beams, choice)
        # From places in the captions of a search to rows of the model.
        parent = choice.parent + row_starts(*beams.logprob.shape)
        numbers, word = beams.search, choice.word
        if going is not None:
            numbers, logprob, parent, word = numbers[going], logprob[going], parent[going], word[going]
        parents, tokens = parent.ravel(), word.ravel()
        words = beams.words.take(parents, axis=0)
        words[:, beams.time] = tokens
        beams = Beams(logprob, numbers, beams.time + 1, words)
    found.cut(beams)
    return found.ranked(), steps


def relaxed(
    model: StepModel, features: Floats, special: SpecialTokens, options: DecodingOptions, watch: bool = False
) -> tuple[list[list[Hypothesis]], list[Step]]:
    """Search without the required words, where no caption can have them; `satisfied` of the captions is false."""
    captions, steps = search(model, features, special, replace(options, required_words=()), watch)
    return [[replace(hypothesis, satisfied=False) for hypothesis in found] for found in captions], steps


def _policy(options: DecodingOptions, special: SpecialTokens, features: Floats) -> Policy:
    if options.method == "sample":
        return Sampling(options, special.end, features)
    if options.required_words:
        return ConstrainedBeamSearch(options, special, len(features))
    return BeamSearch(options, special.end)


class _Caption(NamedTuple):
    """A caption that is over."""

    photo: int
    words: list[int]
    logprob: float
    finished: bool  # ended with [end]
    stuck: bool = False  # the last caption of a group that came to a dead end


class _Found:
    """Collects the captions that are over, and so knows which searches are."""

    def __init__(self, options: DecodingOptions, policy: Policy, photos: int) -> None:
        self._options, self._policy, self._photos = options, policy, photos
        self._captions: list[_Caption] = []
        groups = photos * policy.searches * policy.groups  # of all searches; from here on they are numbered through
        self._scores: list[list[float]] = [[] for _ in range(groups)]  # of the captions that ended, worst first
        self._dead: dict[int, _Caption] = {}  # the last captions of groups that came to a dead end
        #: The score that a caption of each group must exceed, `(searches, groups)`: infinite where the group is over.
        self._least: Floats = np.full((photos * policy.searches, policy.groups), -np.inf, np.float32)

    def follow(self, beams: Beams, choice: Choice) -> tuple[Floats, npt.NDArray[np.bool_] | None]:
        """Note the captions that ended.

        A group goes on until as many captions ended as it has beams. A search goes on until no group does, or until no
        caption can be among the best any more. To drop a single caption sooner would let worse ones end in its place,
        and so end the search too early; to drop a single group would leave its words to the groups after it.

        Returns:
            Log-probabilities of the captions that were kept, -inf in groups that are over, and which searches go on;
            None: all.
        """
        self._note(beams, choice.ended, finished=True)
        least = self._least.take(beams.search, axis=0)
        logprob = choice.logprob.reshape(len(least), self._policy.groups, -1)
        # Log-probabilities only fall, so that the score at the longest length bounds the score of whatever may follow.
        promising = _score(logprob.max(axis=2), self._options.max_words, self._options) > least
        if promising.all():
            return choice.logprob, None
        self._note_dead(beams, ~promising)
        if self._policy.groups > 1:
            logprob = np.where(least[:, :, None] < np.inf, logprob, NEVER)
        going: npt.NDArray[np.bool_] = np.any(promising, axis=1)
        return logprob.reshape(len(least), -1), going

    def cut(self, beams: Beams) -> None:
        """Note the captions that were still being written after the last step."""
        self._note(beams, beams.logprob, finished=False)

    def ranked(self) -> list[list[Hypothesis]]:
        """The best captions of each photo."""
        found = [*self._captions, *(self._dead[number] for number in sorted(self._dead))]
        logprobs: Floats = np.array([caption.logprob for caption in found], np.float32)
        length = np.array([max(len(caption.words) + caption.finished, 1) for caption in found])
        scores = _score(logprobs, length, self._options).tolist()
        captions: list[list[Hypothesis]] = [[] for _ in range(self._photos)]
        for score, (photo, words, logprob, finished, stuck) in sorted(
            zip(scores, found, strict=True), key=lambda each: (each[1].stuck, -each[0])
        ):
            others, tokens = captions[photo], tuple(words)
            again = self._policy.distinct and any(other.tokens == tokens for other in others)
            if len(others) < self._options.num_captions and not again:
                satisfied = not (stuck and self._options.required_words)
                others.append(Hypothesis(tokens, logprob, score, finished, satisfied))
        return captions

    def _note(self, beams: Beams, logprob: Floats, *, finished: bool) -> None:
        """Note the captions whose log-probability is not -inf."""
        row, place = (logprob > NEVER).nonzero()
        if not len(row):
            return
        policy, size = self._policy, logprob.shape[1] // self._policy.groups
        logprob = logprob[row, place]
        score = _score(logprob, beams.time + 1, self._options)
        group = beams.search[row] * policy.groups + place // size
        words = beams.words[row * beams.logprob.shape[1] + place, : beams.time]
        ended = zip(*(part.tolist() for part in (group, words, logprob, score)), strict=True)
        for number, tokens, total, points in ended:
            self._captions.append(_Caption(number // (policy.groups * policy.searches), tokens, total, finished))
            scores = self._scores[number]
            insort(scores, points)
            if len(scores) >= policy.wanted:
                self._least.flat[number] = scores[-policy.wanted] if len(scores) < policy.quota else np.inf

    def _note_dead(self, beams: Beams, over: npt.NDArray[np.bool_]) -> None:
        """Note the likeliest caption that a group had, where no caption ended and none goes on."""
        policy = self._policy
        for row, group in zip(*(part.tolist() for part in over.nonzero()), strict=True):
            number = int(beams.search[row]) * policy.groups + group
            if not self._scores[number] and number not in self._dead:
                logprob = beams.logprob[row].reshape(policy.groups, -1)
                place = group * logprob.shape[1] + int(logprob[group].argmax())
                words = beams.words[row * logprob.size + place, : beams.time].tolist()
                photo = number // (policy.groups * policy.searches)
                self._dead[number] = _Caption(photo, words, float(logprob[group].max()), False, stuck=True)


def _considered(candidates: Candidates, named: Integers, beams: Beams, count: int) -> tuple[Floats, Integers]:
    """The likeliest words to follow each caption, for `explain`."""
    logprob = np.hstack([candidates.logprob, candidates.named])
    words = (candidates.word, candidates.logprob), (named, candidates.named)
    word = np.hstack([np.broadcast_to(ids, known.shape) for ids, known in words])
    best = largest(logprob, count)
    grid = (*beams.logprob.shape, -1)
    return np.take_along_axis(logprob, best, axis=1).reshape(grid), np.take_along_axis(word, best, axis=1).reshape(grid)


def _score(logprob: Floats, length: Any, options: DecodingOptions) -> Floats:
    """The numbers that captions are ranked by.

    Args:
        logprob: of captions.
        length: number of predictions that it is the sum of: the words, and `[end]` where it was found.
        options: "gnmt" is equation 14 of Wu et al. 2016 without its coverage term.
    """
    if options.length_normalisation == "average":
        logprob = logprob / length
    elif options.length_normalisation == "gnmt":
        logprob = logprob / ((5 + length) / 6) ** options.gnmt_alpha
    return logprob
