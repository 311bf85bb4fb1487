"""What captions must not have, and what they must.

Forbidden is simple: those words get probability 0. Required is a search of its own: a finite automaton knows how far
every caption has come, and captions compete only with those that have as much still to write.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from captioner.config import DecodingOptions
from captioner.decoding.beam import Beams, Choice, Outlook, among_best
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


class Bans:
    """Words that may not come next get probability 0, a surprisal of inf; the other probabilities stay as they are."""

    def __init__(self, options: DecodingOptions, special: SpecialTokens, searches: int, device: torch.device) -> None:
        """Look up what is forbidden.

        Args:
            options: `forbidden_words`, `min_words`, `no_repeat_ngram`.
            special: the vocabulary. `[pad]`, `[start]` and `[unk]` are never written.
            searches: how many there are.
            device: where they run.

        Raises:
            CaptionerError: a forbidden word is not one word.
        """
        never = {special.pad, special.start, special.unk} | forbidden_ids(special, options)
        self._never = torch.tensor(sorted(never), device=device)
        self._end = special.end
        self._min_words = options.min_words
        self._ngram = options.no_repeat_ngram
        self._history = torch.zeros(searches, 1, 0, dtype=torch.long, device=device)

    def apply(self, surprisal: Float[Tensor, "rows vocabulary"], time: int, beams: Beams) -> None:
        """Rule out what may not come next, in place."""
        surprisal.index_fill_(1, self._never, torch.inf)
        if time < self._min_words:
            surprisal[:, self._end] = torch.inf
        if 0 < self._ngram <= time:
            self._apply_ngram(surprisal, beams)

    def follow(self, choice: Choice) -> None:
        """Remember the words that were chosen, where they matter."""
        if self._ngram:
            parent = choice.parent[..., None].expand(-1, -1, self._history.shape[2])
            self._history = torch.cat([self._history.gather(1, parent), choice.word[..., None]], dim=2)

    def _apply_ngram(self, surprisal: Tensor, beams: Beams) -> None:
        history = self._history.flatten(0, 1)[beams.rows]
        runs = history.unfold(1, self._ngram, 1)  # (rows, starts, n)
        latest = history[:, None, history.shape[1] - self._ngram + 1 :]
        again = (runs[..., :-1] == latest).all(-1)  # this run began as the words just written: it may not end the same
        repeated = runs[..., -1]
        if surprisal.device.type == "cpu":  # which need not be waited for to know that there are few
            row, run = again.nonzero(as_tuple=True)
            surprisal[row, repeated[row, run]] = torch.inf
            return
        least = torch.where(again, torch.inf, 0.0).to(surprisal.dtype)
        surprisal.scatter_reduce_(1, repeated, least, "amax")


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

    searches = 1
    distinct = True

    def __init__(self, options: DecodingOptions, special: SpecialTokens, images: int, device: torch.device) -> None:
        """Prepare the search.

        Args:
            options: `required_words`, `forbidden_words` and the beam.
            special: a `Vocabulary`.
            images: how many there are.
            device: where they are.

        Raises:
            CaptionerError: see `Automaton.of`.
        """
        automaton = Automaton.of(options, special)
        self.width = self.quota = options.width
        self.banks = automaton.needed[0] + 1
        self.beams = self.width * self.banks
        self.wanted = min(options.num_captions, self.width)
        self._left = options.max_words
        self._always = torch.tensor([special.end, *automaton.words], device=device)
        self._following = torch.tensor(automaton.following, device=device)
        self._needed = torch.tensor(automaton.needed, device=device)
        self._state = torch.zeros(images, self.beams, dtype=torch.long, device=device)

    def choose(self, outlook: Outlook, beams: Beams) -> Choice:
        """Fill every bank with its likeliest captions."""
        self._left -= 1
        # The words that requirements are about are always considered; of the others, which lead to one state, the best.
        logprob, word = outlook.likeliest(self.width, always=self._always)
        reached, words = beams.continued(logprob), beams.spread(word, 0)
        ended, going, words = reached[..., 0], reached[..., 1:], words[..., 1:]  # (images, beams[, ours + others])
        ended = ended.masked_fill(self._needed[self._state] > 0, -torch.inf)
        column = torch.arange(words.shape[2], device=words.device).clamp_(max=len(self._always) - 1)
        following = self._following[self._state][..., column]
        needed = self._needed[following]
        going = going.masked_fill(needed > self._left, -torch.inf)

        parents, words_chosen, logprobs, states = [], [], [], []
        for bank in range(self.banks):
            ours = needed == self.banks - 1 - bank
            logprob, best = going.masked_fill(~ours, -torch.inf).flatten(1).topk(self.width)
            parents.append(best.div(words.shape[2], rounding_mode="floor"))
            words_chosen.append(words.flatten(1).gather(1, best))
            states.append(following.flatten(1).gather(1, best))
            logprobs.append(logprob)
        self._state = torch.cat(states, dim=1)
        ended = among_best(ended, logprobs[-1])  # nothing ends but in the last bank
        return Choice(torch.cat(parents, dim=1), torch.cat(words_chosen, dim=1), torch.cat(logprobs, dim=1), ended)


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
