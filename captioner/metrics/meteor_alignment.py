"""Which words of a hypothesis METEOR 1.5 takes for which words of a reference (Denkowski & Lavie, WMT 2014, section 2).

Candidates are words or phrases that are equal, have the same stem, share a synset or are paraphrases. Of all ways to
choose candidates that do not overlap, the one is sought that covers most, then has the fewest chunks (runs of matches
that are neighbours in both sentences), then the smallest distance. The search is a beam along the reference. The paper
leaves open how ties are broken and what a beam forgets; there the search does as `meteor-1.5.jar` does, see `align`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
"""The kinds of matches."""

_BEAM = 40
# A path is ranked by one number, the smaller the better: words covered, then chunks, then distance.
_COVERED, _CHUNK = 1 << 62, 1 << 40


class Word(NamedTuple):
    """A word, whichever sentence it stands in."""

    key: int  # equal words have equal ones
    stem: int  # the key of its stem
    synsets: frozenset[int]
    function: bool  # whether it is one of the words that weigh less


Match = tuple[int, int, int, int, int]
"""Words that may stand for one another: the kind (EXACT to PARAPHRASE), the first word and the words in the reference,
the first word and the words in the hypothesis. A plain tuple, because millions are made."""

Span = tuple[int, int, int]
"""A phrase in a sentence: its number, its first word, its words."""


class Sentence:
    """A sentence as the matchers need it.

    Args:
        words: its words.
        phrases: those of its phrases that have paraphrases or are one, in the order of the first word, then of length.
    """

    __slots__ = ("by_phrase", "phrases", "words")

    def __init__(self, words: Sequence[Word], phrases: Sequence[Span]) -> None:
        self.words = words
        self.phrases = phrases
        self.by_phrase: dict[int, list[Span]] = {}
        for span in phrases:
            self.by_phrase.setdefault(span[0], []).append(span)


class Hypothesis(Sentence):
    """A sentence whose words are looked up, once for each of its references."""

    __slots__ = ("by_key", "by_stem", "by_synset")

    def __init__(self, words: Sequence[Word], phrases: Sequence[Span]) -> None:
        super().__init__(words, phrases)
        self.by_key: dict[int, list[int]] = {}
        self.by_stem: dict[int, list[int]] = {}
        self.by_synset: dict[int, list[int]] = {}
        for place, word in enumerate(words):
            self.by_key.setdefault(word.key, []).append(place)
            self.by_stem.setdefault(word.stem, []).append(place)
            for synset in word.synsets:
                self.by_synset.setdefault(synset, []).append(place)


def candidates(
    hypothesis: Hypothesis, reference: Sentence, paraphrases: Callable[[int], dict[int, int]]
) -> list[list[Match]]:
    """All possible matches, by the first word in the reference; exact ones first, then stems, synonyms, paraphrases.

    Args:
        hypothesis: the caption to score.
        reference: a human caption.
        paraphrases: from the number of a phrase to the numbers of its paraphrases, each with its place in the table.
    """
    found: list[list[Match]] = []
    differ = len(hypothesis.words) != len(reference.words)
    for place, word in enumerate(reference.words):
        equal = hypothesis.by_key.get(word.key, ())
        found.append([(EXACT, place, 1, other, 1) for other in equal])
        differ = differ or place not in equal
    if not differ:  # equal sentences are matched word by word
        return found
    words = hypothesis.words
    by_stem, by_synset = hypothesis.by_stem, hypothesis.by_synset
    for place, (key, stem, synsets, _) in enumerate(reference.words):
        here = found[place]
        for other in by_stem.get(stem, ()):
            if words[other].key != key:
                here.append((STEM, place, 1, other, 1))
        shared = by_synset.keys() & synsets
        if shared:
            for other in sorted({other for synset in shared for other in by_synset[synset]}):
                if words[other].key != key:
                    here.append((SYNONYM, place, 1, other, 1))
    for number, place, length in reference.phrases:
        for _, other, other_length in _occurrences(paraphrases(number), hypothesis):
            found[place].append((PARAPHRASE, place, length, other, other_length))
    for number, place, length in hypothesis.phrases:
        for _, other, other_length in _occurrences(paraphrases(number), reference):
            found[other].append((PARAPHRASE, other, other_length, place, length))
    return found


def _occurrences(phrases: dict[int, int], sentence: Sentence) -> Sequence[Span]:
    """Where in a sentence any of some phrases stand, in the order of the phrases."""
    if phrases.keys().isdisjoint(sentence.by_phrase):
        return ()
    shared = sorted(phrases.keys() & sentence.by_phrase.keys(), key=phrases.__getitem__)
    return [span for number in shared for span in sentence.by_phrase[number]]


_Chosen = tuple[Match, "_Chosen"] | None
# A choice of candidates for the words of the reference up to some word: its rank; a bit for each word of the hypothesis
# that is matched; where in the hypothesis the last match ends, -1 if the next word is no neighbour of it; the first
# word of the reference behind the last match; the matches, last first. A plain tuple for speed.
_Path = tuple[int, int, int, int, _Chosen]
_rank = itemgetter(0)


def align(found: Sequence[Sequence[Match]], words: int) -> list[Match]:
    """Chooses matches as `meteor-1.5.jar` does.

    The jar has habits that the paper does not tell, and all of them can change a score:

    - a candidate that overlaps no other is always taken;
    - a match that is not exact covers half its words, rounded down in each sentence: a single such word counts
      nothing and is taken only where it adds no chunk;
    - the distance of a candidate is added to the paths that leave this candidate out (the next candidates of the same
      word, and the path without any), not to the path that takes it;
    - a chunk is counted when it ends, the last one after the last 40 paths were chosen;
    - sorting is stable: of two equal paths the one that was first stays first.

    Args:
        found: the possible matches, as `candidates` returns them.
        words: words in the hypothesis.

    Returns:
        The matches, in the order of the reference.
    """
    fixed = _without_rival(found, words)
    paths: list[_Path] = [(0, 0, -1, 0, None)]
    for place, options in enumerate(found):
        if len(paths) > 1:
            paths.sort(key=_rank)
        before, paths = paths[:_BEAM], []
        for path in before:
            rank, used, end, following, chosen = path
            if following > place:
                paths.append(path)
                continue
            for match in options:
                kind, _, length, other, other_length = match
                covered = ((1 << other_length) - 1) << other
                if used & covered:
                    continue
                size = 2 if kind == EXACT else length // 2 + other_length // 2
                new = rank - size * _COVERED if end < 0 or end == other else rank - size * _COVERED + _CHUNK
                paths.append((new, used | covered, other + other_length, place + length, (match, chosen)))
                rank += abs(place - other)
            if not fixed[place]:
                paths.append((rank if end < 0 else rank + _CHUNK, used, -1, following, chosen))
    paths.sort(key=_rank)
    best = min(paths[:_BEAM], key=lambda path: path[0] if path[2] < 0 else path[0] + _CHUNK)
    matches: list[Match] = []
    rest = best[4]
    while rest is not None:
        match, rest = rest
        matches.append(match)
    return matches[::-1]


def _without_rival(found: Sequence[Sequence[Match]], words: int) -> list[bool]:
    """For each word of the reference whether its only candidate overlaps no other candidate in either sentence."""
    reference, hypothesis = [0] * len(found), [0] * words
    for options in found:
        for _, place, length, other, other_length in options:
            for covered in range(place, place + length):
                reference[covered] += 1
            for covered in range(other, other + other_length):
                hypothesis[covered] += 1
    alone = [False] * len(found)
    for options in found:
        if len(options) == 1:
            _, place, length, other, other_length = options[0]
            covers = (*reference[place : place + length], *hypothesis[other : other + other_length])
            alone[place] = sum(covers) == length + other_length
    return alone
