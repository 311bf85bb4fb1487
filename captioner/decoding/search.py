"""The search for captions, over any `StepModel`.

One loop writes the captions of many photos at once, word by word (`search`). A policy decides which captions are kept
after each word: beam search in `beam.py`, sampling in `sampling.py`, required words in `constraints.py`. The loop
stores the words that were chosen and the captions that they continue; whole captions are read off backwards at the
end.

Log-probabilities are the model's own: natural logs of a softmax over the whole vocabulary, with `[pad]`, `[start]`
and `[unk]` in it although they are never written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from captioner.config import DecodingOptions
from captioner.decoding.beam import Beams, BeamSearch, Candidates, Choice, Policy
from captioner.decoding.constraints import ConstrainedBeamSearch, Rules, SpecialTokens, forbidden_ids
from captioner.decoding.sampling import Sampling
from captioner.decoding.step import Floats, Integers, StepModel, largest

__all__ = ["Hypothesis", "SpecialTokens", "StepModel", "decode"]

_ROWS = 768  # captions that are written at once: enough to keep a model busy, few enough for a processor's cache
_ROWS_WORKER = 64  # as many are worth a worker of their own


@dataclass(frozen=True)
class Hypothesis:
    """A caption that the search found."""

    tokens: tuple[int, ...]  # ids of the words, without [start] and [end]
    logprob: float  # natural log of the probability of the words (and of [end], where it was found)
    score: float  # what hypotheses are ranked by: logprob after length normalisation
    finished: bool  # ended with [end], rather than cut at max_words or because no word could follow
    satisfied: bool = True  # has every required word


class Step(NamedTuple):
    """What happened at one word."""

    beams: Beams  # the captions that were to be continued
    choice: Choice  # the captions that were kept, and those that ended
    #: Log-probabilities of the likeliest words and their ids, `(searches, captions, words)`, if they were asked for.
    considered: tuple[Floats, Integers] | None = None


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
    parts = np.array_split(features, min(count, photos)) if photos else []

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
    endings = _Endings(options, policy, photos * policy.searches)
    count = max(policy.count, policy.beams + 1) if watch and policy.count is not None else policy.count

    # Every search begins with a caption of no words, or one in each group.
    searches = np.arange(photos * policy.searches)
    beams = Beams(np.zeros((len(searches), policy.groups), np.float32), searches, 0)
    tokens = np.full(beams.logprob.size, special.start)
    parents = np.repeat(np.arange(photos), policy.searches * policy.groups)
    state = model.start(features)
    steps: list[Step] = []
    while len(beams.search) and beams.time < options.max_words:
        candidates, state = rules.ask(model, tokens, parents, state, count, beams.time)
        choice = policy.choose(candidates, beams)
        considered = _considered(candidates, policy.named, beams, policy.beams + 1) if watch else None
        steps.append(Step(beams, choice, considered))
        logprob, going = endings.follow(beams, choice)
        # From places in the captions of a search to rows of the model.
        parent = choice.parent + np.arange(0, beams.logprob.size, beams.logprob.shape[1])[:, None]
        numbers, word = beams.search, choice.word
        if not going.all():
            numbers, logprob, parent, word = numbers[going], logprob[going], parent[going], word[going]
        beams, parents, tokens = Beams(logprob, numbers, beams.time + 1), parent.ravel(), word.ravel()
    return _captions(steps, beams, photos, policy, options), steps


def relaxed(
    model: StepModel, features: Floats, special: SpecialTokens, options: DecodingOptions, watch: bool = False
) -> tuple[list[list[Hypothesis]], list[Step]]:
    """As `search`, without the required words, where no caption can have them; the captions are marked so."""
    captions, steps = search(model, features, special, replace(options, required_words=()), watch)
    return [[replace(hypothesis, satisfied=False) for hypothesis in found] for found in captions], steps


def _policy(options: DecodingOptions, special: SpecialTokens, features: Floats) -> Policy:
    if options.method == "sample":
        return Sampling(options, special.end, features)
    if options.required_words:
        return ConstrainedBeamSearch(options, special, len(features))
    return BeamSearch(options, special.end)


class _Endings:
    """Counts the captions that ended, and so knows which searches are over."""

    def __init__(self, options: DecodingOptions, policy: Policy, searches: int) -> None:
        self._options = options
        self._quota = policy.quota
        self._count = np.zeros((searches, policy.groups), np.int64)
        #: Scores of the best captions that ended, worst first, `(searches, groups, wanted)`.
        self._best: Floats = np.full((searches, policy.groups, policy.wanted), -np.inf, np.float32)

    def follow(self, beams: Beams, choice: Choice) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Note the captions that ended.

        A group goes on until as many captions ended as it has beams. A search goes on until no group does, or until no
        caption can be among the best any more. To drop a single caption sooner would let worse ones end in its place,
        and so end the search too early; to drop a single group would leave its words to the groups after it.

        Returns:
            Log-probabilities of the captions that were kept, -inf in groups that are over, and which searches go on.
        """
        searches, groups = len(beams.search), self._count.shape[1]
        ended, logprob = choice.ended.reshape(searches, groups, -1), choice.logprob.reshape(searches, groups, -1)
        found = ended > -np.inf
        if found.any():
            self._count[beams.search] += found.sum(axis=2)
            scores = np.concatenate([self._best[beams.search], _score(ended, beams.time + 1, self._options)], axis=2)
            scores.sort(axis=2)
            self._best[beams.search] = scores[:, :, -self._best.shape[2] :]
        over = self._count[beams.search] >= self._quota
        if groups > 1:
            logprob = np.where(over[:, :, None], np.float32(-np.inf), logprob)
        # Log-probabilities only fall, so that the score at the longest length bounds the score of whatever may follow.
        bound = _score(logprob.max(axis=2), self._options.max_words, self._options)
        promising = (bound > self._best[beams.search, :, 0]) & ~over
        going: npt.NDArray[np.bool_] = np.any(promising, axis=1)
        return logprob.reshape(searches, -1), going


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


#: A caption that a search found.
_OUTCOME = np.dtype(
    [
        ("words", np.int64),  # how many it has
        ("search", np.int64),  # the number of its search
        ("place", np.int64),  # its place among the captions of the search that had as many words
        ("logprob", np.float32),
        ("finished", np.bool_),  # ended with [end]
        ("stuck", np.bool_),  # the last caption of a group that came to a dead end
    ]
)
_Outcomes = npt.NDArray[np.void]  # of this type


def _captions(
    steps: Sequence[Step], last: Beams, photos: int, policy: Policy, options: DecodingOptions
) -> list[list[Hypothesis]]:
    """Collect the captions that ended and those that were cut, and rank them.

    Args:
        steps: of the search.
        last: captions that were still being written after the last step.
        photos: how many there are.
        policy: of the search.
        options: say how captions are ranked, and how many are wanted.
    """
    ended = [_outcomes(step.beams, step.choice.ended, finished=True) for step in steps]
    found = np.concatenate([*ended, _outcomes(last, last.logprob)])
    # Groups in which nothing ended and nothing was cut came to a dead end; groups are counted through all searches.
    widths = np.array([*(step.beams.logprob.shape[1] for step in steps), last.logprob.shape[1]]) // policy.groups
    group = found["search"] * policy.groups + found["place"] // widths[found["words"]]
    dead = np.flatnonzero(np.bincount(group, minlength=photos * policy.searches * policy.groups) == 0)
    found = np.concatenate([found, *(_last_caption(steps, number, policy.groups) for number in dead.tolist())])

    score = _score(found["logprob"], np.maximum(found["words"] + found["finished"], 1), options)
    image = found["search"] // policy.searches
    order = np.lexsort((-score, found["stuck"], image))
    # Groups may find the same caption, so that as many times as many captions are read.
    rank = np.arange(len(order)) - np.searchsorted(image[order], image[order])
    order = order[rank < options.num_captions * policy.groups]
    found = found[order]

    captions: list[list[Hypothesis]] = [[] for _ in range(photos)]
    ranked = zip(image[order].tolist(), score[order].tolist(), found.tolist(), _read_back(steps, found), strict=True)
    for photo, points, (words, _, _, logprob, finished, stuck), tokens in ranked:
        satisfied = not (stuck and options.required_words)
        hypothesis = Hypothesis(tuple(tokens[:words]), logprob, points, finished, satisfied)
        others = captions[photo]
        again = policy.distinct and any(other.tokens == hypothesis.tokens for other in others)
        if len(others) < options.num_captions and not again:
            others.append(hypothesis)
    return captions


def _outcomes(beams: Beams, logprob: Floats, *, finished: bool = False) -> _Outcomes:
    """The captions of a grid whose log-probability is not -inf."""
    row, place = np.nonzero(logprob > -np.inf)
    found = np.zeros(len(row), _OUTCOME)
    found["words"], found["finished"] = beams.time, finished
    found["search"], found["place"], found["logprob"] = beams.search[row], place, logprob[row, place]
    return found


def _last_caption(steps: Sequence[Step], number: int, groups: int) -> _Outcomes:
    """The likeliest caption that a group, counted through all searches, had before it came to a dead end."""
    search, group = divmod(number, groups)
    for beams, *_ in reversed(steps):
        for row in np.flatnonzero(beams.search == search):
            logprob = beams.logprob[row].reshape(groups, -1)[group]
            best = int(logprob.argmax())
            if logprob[best] > -np.inf:
                outcome = (beams.time, search, group * len(logprob) + best, logprob[best], False, True)
                return np.array([outcome], _OUTCOME)
    raise AssertionError("every group begins with a caption")


def _read_back(steps: Sequence[Step], captions: _Outcomes) -> list[list[int]]:
    """Follow captions from their last word to their first, all at once.

    Args:
        steps: of the search.
        captions: whose words are wanted.

    Returns:
        The words of each, and after them zeros up to the same length.
    """
    tokens = np.zeros((len(captions), len(steps)), np.int64)
    place = captions["place"].copy()
    for time in reversed(range(len(steps))):
        written = np.flatnonzero(captions["words"] > time)
        choice = steps[time].choice
        row = np.searchsorted(steps[time].beams.search, captions["search"][written])
        tokens[written, time] = choice.word[row, place[written]]
        place[written] = choice.parent[row, place[written]]
    result: list[list[int]] = tokens.tolist()
    return result
