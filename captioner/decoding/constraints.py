"""Words that captions must not have, and words that they must have.

Words that are ruled out get probability 0. Required words need a search of their own: a finite automaton knows how
many words each caption still needs, and captions compete only with those that need as many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from captioner.config import DecodingOptions
from captioner.decoding.beam import NEVER, Beams, Candidates, Choice, Policy, among_best
from captioner.decoding.step import Floats, Integers, State, StepModel, largest
from captioner.errors import CaptionerError

_MOST_STATES = 4096


class SpecialTokens(Protocol):
    """The ids that are no words; `Vocabulary` has them."""

    pad: int
    start: int
    end: int
    unk: int


@runtime_checkable
class _Lexicon(Protocol):
    def encode(self, captions: Sequence[str], /) -> list[list[int]]: ...


def word_ids(special: SpecialTokens, phrase: str, setting: str) -> tuple[int, ...]:
    """The ids of a word or phrase that a setting names.

    Raises:
        CaptionerError: the vocabulary lacks one of the words, or there are none.
    """
    if not isinstance(special, _Lexicon):
        raise CaptionerError(f"{setting} are words; expected a Vocabulary that knows their ids")
    ids = tuple(i for i in special.encode([phrase])[0] if i not in (special.start, special.end))
    if not ids:
        raise CaptionerError(f"{setting}: {phrase!r} has no word; expected words, without punctuation")
    return ids


def forbidden_ids(special: SpecialTokens, options: DecodingOptions) -> set[int]:
    """The ids of `forbidden_words`; a word that the vocabulary lacks is never written anyway.

    Raises:
        CaptionerError: one of them is not one word.
    """
    found: set[int] = set()
    for word in options.forbidden_words:
        ids = word_ids(special, word, "forbidden_words")
        if len(ids) > 1:
            raise CaptionerError(f"forbidden_words: {word!r} is {len(ids)} words; expected one word in each")
        found.update(ids)
    return found


#: Words of grammar, which a good caption may have twice; all others name things, properties and actions.
GRAMMAR = """a an the of in on at to and or with by for from is are was were be being been his her their its it he she
they them that this there as up down out off over under into onto next near through while one two three some other
another who which has have not n't 's very all behind around along between across front top"""


class Rules:
    """Asks a model for words, without those that may not come; the probabilities of the others stay as they are."""

    def __init__(self, options: DecodingOptions, special: SpecialTokens, policy: Policy, size: int) -> None:
        """Look up the words that may not come.

        Args:
            options: `forbidden_words`, `min_words`, `no_repeat_ngram`, `unique_words`.
            special: the vocabulary. `[pad]`, `[start]` and `[unk]` are never written.
            policy: the words that it names are not among the others.
            size: of the vocabulary.

        Raises:
            CaptionerError: a forbidden word is not one word.
        """
        never = {special.pad, special.start, special.unk} | forbidden_ids(special, options)
        others = never.union(policy.named.tolist())
        #: Added to log-probabilities; a caption that is too short for `min_words` may not end.
        self._late: Floats = np.zeros(size, np.float32)
        self._late[sorted(others)] = -np.inf
        self._early = self._late.copy()
        self._early[special.end] = -np.inf
        self._named_early: Floats = np.where(policy.named == special.end, NEVER, np.float32(0))
        self._passed = len(others | {special.end})  # words that the model may answer with in vain
        self._named = policy.named
        self._all: Integers = np.arange(size)
        self._min_words = options.min_words
        self._ngram = options.no_repeat_ngram
        #: Whether a word may come only once; None: all words may come again.
        self._once: npt.NDArray[np.bool_] | None = None
        if options.unique_words:
            self._once = np.ones(size, np.bool_)
            self._once[list(word_ids(special, GRAMMAR, "unique_words"))] = False

    def ask(
        self, model: StepModel, tokens: Integers, parents: Integers, state: State, count: int | None, beams: Beams
    ) -> tuple[Candidates, State]:
        """Ask for the words that may follow.

        Args:
            model: knows their probabilities.
            tokens: see `StepModel.step`.
            parents: see `StepModel.step`.
            state: see `StepModel.step`.
            count: how many of the likeliest, beside those that the policy named; None: all.
            beams: the captions that they may follow.
        """
        row, word = self._repeats(beams)
        early = beams.time < self._min_words
        penalty = self._early if early else self._late
        if count is None:
            logprob, state = model.step_all(tokens, parents, state)
            logprob = np.fmax(logprob + penalty, NEVER)  # which also takes the place of NaN
            logprob[row, word] = -np.inf
            return Candidates(logprob, self._all, logprob[:, :0]), state
        most = int(np.bincount(row).max()) if len(row) else 0
        count = min(count + self._passed + most, len(self._all))
        (logprob, words, named), state = model.step(tokens, parents, state, count, self._named)
        logprob = np.fmax(logprob + penalty.take(words), NEVER)
        named = np.fmax(named, NEVER)
        if early:
            named += self._named_early
        if len(row):
            for known, ids in ((logprob, words[row]), (named, self._named[None])):
                pair, column = np.nonzero(ids == word[:, None])
                known[row[pair], column] = -np.inf
        return Candidates(logprob, words, named), state

    def _repeats(self, beams: Beams) -> tuple[Integers, Integers]:
        """The rows and words that would repeat a run of words, or a word that may come only once."""
        row, word = self._repeated_runs(beams)
        if self._once is None or not beams.time:
            return row, word
        written = beams.words[:, : beams.time]
        again, place = self._once[written].nonzero()
        return np.concatenate([row, again]), np.concatenate([word, written[again, place]])

    def _repeated_runs(self, beams: Beams) -> tuple[Integers, Integers]:
        """The rows and words that would repeat a run of `no_repeat_ngram` words."""
        runs = beams.time - self._ngram + 1  # that a caption has
        if not self._ngram or runs <= 0:
            return self._all[:0], self._all[:0]
        words, before = beams.words, self._ngram - 1  # words of a run before its last
        if not before:
            begins = np.ones((len(words), runs), np.bool_)
        else:  # whether a run goes on as the captions do: the word just written is rarely an earlier one too
            begins = words[:, before - 1 : before - 1 + runs] == words[:, beams.time - 1, None]
        row, run = begins.nonzero()
        if not len(row):
            return row, run
        for place in range(before - 1):
            same = words[row, run + place] == words[row, runs + place]
            row, run = row[same], run[same]
        return row, words[row, run + before]


class Automaton:
    """Reads a caption word by word and knows how many words it still needs to have all that is required.

    A state is the place in the phrases that the last words spell (Aho & Corasick 1975) and the set of requirements
    met before; this is the finite-state machine of Anderson et al. 2017, with the phrases of Post & Vilar 2018.
    """

    @classmethod
    def of(cls, options: DecodingOptions, special: SpecialTokens) -> Automaton:
        """The one for `required_words`, remembered from search to search.

        Raises:
            CaptionerError: a required word is unknown or forbidden, they are too many, or do not fit into a caption.
        """
        automaton = _automaton(tuple(_alternatives(entry, special, options) for entry in options.required_words))
        if automaton.needed[0] > options.max_words:
            raise CaptionerError(
                f"required_words are {automaton.needed[0]} words and max_words is {options.max_words}; "
                "expected max_words to have room for them"
            )
        return automaton

    def __init__(self, requirements: Sequence[Sequence[tuple[int, ...]]]) -> None:
        """Build the tables.

        Args:
            requirements: for each, the phrases that meet it, as ids of words.

        Raises:
            CaptionerError: they are too many to search for at once.
        """
        phrases = [(phrase, number) for number, options in enumerate(requirements) for phrase in options]
        self.words = sorted({word for phrase, _ in phrases for word in phrase})
        prefixes = sorted(
            {phrase[:n] for phrase, _ in phrases for n in range(len(phrase) + 1)}, key=lambda p: (len(p), p)
        )
        if len(prefixes) << len(requirements) > _MOST_STATES:
            raise CaptionerError(
                f"required_words has {len(requirements)} entries, too many to search for together; expected 6 or so"
            )
        sets = [frozenset(i for i, bit in enumerate(bits) if bit) for bits in product((0, 1), repeat=len(requirements))]
        places = {(prefix, met): i for i, (met, prefix) in enumerate(product(sets, prefixes))}

        def following(prefix: tuple[int, ...], met: frozenset[int], word: int) -> int:
            read = (*prefix, word)
            met = met.union(number for phrase, number in phrases if read[-len(phrase) :] == phrase)
            return next(places[read[n:], met] for n in range(len(read) + 1) if (read[n:], met) in places)

        #: State after each of `words`; the last column is the state after any other word. `(states, words + 1)`.
        self.following = [
            [*(following(prefix, met, word) for word in self.words), places[(), met]] for prefix, met in places
        ]
        #: Fewest words from each state until nothing is required any more. `(states,)`.
        self.needed = self._distances([len(met) == len(requirements) for _, met in places])

    def _distances(self, accepting: list[bool]) -> list[int]:
        """Breadth-first from the accepting states, against the arrows."""
        before: list[list[int]] = [[] for _ in self.following]
        for state, row in enumerate(self.following):
            for target in row:
                before[target].append(state)
        needed = [0 if accepts else -1 for accepts in accepting]
        queue = deque(state for state, accepts in enumerate(accepting) if accepts)
        while queue:
            state = queue.popleft()
            for source in before[state]:
                if needed[source] < 0:
                    needed[source] = needed[state] + 1
                    queue.append(source)
        return needed


_automaton = lru_cache(maxsize=8)(Automaton)


class ConstrainedBeamSearch:
    """Beam search in which every caption that ends has what is required.

    Captions with equally many words to go form a bank, and only those of a bank compete: otherwise captions that
    already have an unlikely word would lose to those that put it off (Post & Vilar 2018; Anderson et al. 2017 have a
    bank for each state). Each bank has as many beams as an ordinary search. A caption that has too few words left to
    write all it needs is dropped, so every caption that is found, ended or cut, has everything.
    """

    searches = groups = 1
    distinct = True

    def __init__(self, options: DecodingOptions, special: SpecialTokens, images: int) -> None:
        """Build the automaton.

        Args:
            options: `required_words`, `forbidden_words` and the beam.
            special: a `Vocabulary`.
            images: how many there are.

        Raises:
            CaptionerError: see `Automaton.of`.
        """
        automaton = Automaton.of(options, special)
        self.quota = options.width
        self.count: int | None = options.width
        self.banks = automaton.needed[0] + 1
        self.beams = options.width * self.banks
        self.wanted = min(options.num_captions, options.width)
        # The words that requirements are about are always considered; the others all lead to the same state.
        self.named = np.array([special.end, *automaton.words])
        self._width = options.width
        self._max_words = options.max_words
        self._following = np.array(automaton.following)
        self._needed = np.array(automaton.needed)
        self._state: Integers = np.zeros((images, 1), np.int64)  # of the automaton, `(searches, captions)`

    def choose(self, candidates: Candidates, beams: Beams) -> Choice:
        """Fill every bank with its likeliest captions."""
        searches, captions = beams.logprob.shape
        state = self._state[beams.search]
        ended = beams.logprob + candidates.named[:, 0].reshape(searches, captions)
        ended[self._needed[state] > 0] = -np.inf
        # The required words of each caption, then the likeliest others: (searches, captions * words).
        going = np.hstack([candidates.named[:, 1:], candidates.logprob]) + beams.logprob.reshape(-1, 1)
        required = np.broadcast_to(self.named[1:], (len(going), len(self.named) - 1))
        words = np.hstack([required, candidates.word])
        each = words.shape[1]
        column = np.minimum(np.arange(each), len(self.named) - 1)  # of the automaton's table
        following = self._following[state][..., column].reshape(searches, -1)
        going, words = going.reshape(searches, -1), words.reshape(searches, -1)
        needed = self._needed[following]
        going[needed > self._max_words - beams.time - 1] = -np.inf

        # The bank of captions that need nothing comes last.
        bank = np.arange(self.banks)[::-1, None]
        banked = np.where(needed[:, None] == bank, going[:, None], NEVER)  # (searches, banks, ...)
        place = largest(banked.reshape(searches * self.banks, -1), self._width).reshape(searches, -1)
        row = np.arange(searches)[:, None]
        logprob = np.take_along_axis(banked, place.reshape(searches, self.banks, -1), axis=2).reshape(searches, -1)
        ended = among_best(ended, logprob[:, -(place.shape[1] // self.banks) :], self._width)
        used = np.flatnonzero((logprob.max(axis=0) > -np.inf) | (np.arange(logprob.shape[1]) == 0))
        place, logprob = place[:, used], logprob[:, used]  # without the places that are empty in all searches
        self._state = np.zeros((len(self._state), place.shape[1]), np.int64)
        self._state[beams.search] = following[row, place]
        return Choice(place // each, words[row, place], logprob, ended)


def _alternatives(entry: str, special: SpecialTokens, options: DecodingOptions) -> tuple[tuple[int, ...], ...]:
    """The phrases that meet a requirement, without those that cannot be written.

    Raises:
        CaptionerError: none of them can be.
    """
    phrases = [word_ids(special, phrase, "required_words") for phrase in entry.split("|")]
    known = [phrase for phrase in phrases if special.unk not in phrase]
    if not known:
        raise CaptionerError(
            f"required_words: the vocabulary lacks {entry!r}; expected words that the model has learned"
        )
    forbidden = forbidden_ids(special, options)
    allowed = tuple(phrase for phrase in known if not forbidden.intersection(phrase))
    if not allowed:
        raise CaptionerError(f"{entry!r} is among required_words and forbidden_words; expected it in one of them")
    return allowed
