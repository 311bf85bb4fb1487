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
    """What is to be known of a word, whichever sentence it stands in."""

    key: int  # equal words have equal ones
    stem: int  # the key of its stem
    synsets: frozenset[int]
    function: bool  # whether it is one of the words that weigh less


class Match(NamedTuple):
    """Words of the reference and words of the hypothesis that may stand for one another."""

    kind: int  # EXACT, STEM, SYNONYM or PARAPHRASE
    reference: int  # the first word in the reference
    reference_words: int
    hypothesis: int  # the first word in the hypothesis
    hypothesis_words: int


class Sentence:
    """A sentence as the matchers need it.

    Args:
        words: its words.
        phrases: those of its phrases that have paraphrases or are one: number, first word, words; in the order of the
            first word, then of length.
    """

    __slots__ = ("by_key", "by_phrase", "by_stem", "by_synset", "phrases", "words")

    def __init__(self, words: Sequence[Word], phrases: Sequence[tuple[int, int, int]]) -> None:
        self.words = words
        self.phrases = phrases
        self.by_key: dict[int, list[int]] = {}
        self.by_stem: dict[int, list[int]] = {}
        self.by_synset: dict[int, list[int]] = {}
        self.by_phrase: dict[int, list[tuple[int, int]]] = {}
        for place, word in enumerate(words):
            self.by_key.setdefault(word.key, []).append(place)
            self.by_stem.setdefault(word.stem, []).append(place)
            for synset in word.synsets:
                self.by_synset.setdefault(synset, []).append(place)
        for number, place, length in phrases:
            self.by_phrase.setdefault(number, []).append((place, length))


def candidates(
    hypothesis: Sentence, reference: Sentence, paraphrases: Callable[[int], dict[int, int]]
) -> list[list[Match]]:
    """What could match, by the first word in the reference; exact matches first, then stems, synonyms, paraphrases.

    Args:
        hypothesis: the caption to score.
        reference: a human caption.
        paraphrases: from the number of a phrase to the numbers of its paraphrases, each with its place in the table.
    """
    found: list[list[Match]] = []
    differ = len(hypothesis.words) != len(reference.words)
    for place, word in enumerate(reference.words):
        equal = hypothesis.by_key.get(word.key, ())
        found.append([Match(EXACT, place, 1, other, 1) for other in equal])
        differ = differ or place not in equal
    if not differ:  # equal sentences are matched word by word
        return found
    words = hypothesis.words
    for place, word in enumerate(reference.words):
        here = found[place]
        key = word.key
        same_stem = hypothesis.by_stem.get(word.stem)
        if same_stem is not None:
            here += [Match(STEM, place, 1, other, 1) for other in same_stem if words[other].key != key]
        shared = {other for synset in word.synsets for other in hypothesis.by_synset.get(synset, ())}
        if shared:
            here += [Match(SYNONYM, place, 1, other, 1) for other in sorted(shared) if words[other].key != key]
    for number, place, length in reference.phrases:
        for other, words_there in _occurrences(paraphrases(number), hypothesis):
            found[place].append(Match(PARAPHRASE, place, length, other, words_there))
    for number, place, length in hypothesis.phrases:
        for other, words_there in _occurrences(paraphrases(number), reference):
            found[other].append(Match(PARAPHRASE, other, words_there, place, length))
    return found


def _occurrences(phrases: dict[int, int], sentence: Sentence) -> list[tuple[int, int]]:
    """Where in a sentence any of some phrases stand, in the order of the phrases: first word, words."""
    if phrases.keys().isdisjoint(sentence.by_phrase):
        return []
    shared = sorted(phrases.keys() & sentence.by_phrase.keys(), key=phrases.__getitem__)
    return [span for number in shared for span in sentence.by_phrase[number]]


class _Path(NamedTuple):
    """A choice of candidates for the words of the reference up to some word."""

    rank: int
    used: int  # a bit for each word of the hypothesis that is matched
    end: int  # where in the hypothesis the last match ends; -1 if it is no neighbour of the next word
    following: int  # the first word of the reference behind the last match
    matches: tuple[Match, _Matches] | None


_Matches = tuple[Match, "_Matches"] | None
_rank = itemgetter(0)


def align(found: Sequence[Sequence[Match]], words: int) -> list[Match]:
    """Chooses matches as `meteor-1.5.jar` does.

    Its habits that differ from the paper, or that the paper does not tell:
    a candidate that overlaps no other is always taken; what a match covers is half its words if it is not exact,
    rounded down in each sentence, so that a single such word counts nothing and is taken only where it does not add a
    chunk; the distance of a candidate is counted against the choices that follow it at the same word (further
    candidates, and none at all), not against itself; a chunk is counted when it ends, that of the last word after the
    last 40 paths were chosen; of equals the earlier stays ahead.

    Args:
        found: what `candidates` returned.
        words: in the hypothesis.

    Returns:
        The matches, in the order of the reference.
    """
    fixed = _without_rival(found, words)
    paths = [_Path(0, 0, -1, 0, None)]
    sorted_yet = True
    for place, options in enumerate(found):
        if not sorted_yet:
            paths.sort(key=_rank)
            del paths[_BEAM:]
        before, paths = paths, []
        for path in before:
            rank, used, end, following, matches = path
            if following > place:
                paths.append(path)
                continue
            if options and fixed[place]:
                paths.append(_extended(path, options[0], rank))
                continue
            for match in options:
                if not used & (((1 << match[4]) - 1) << match[3]):
                    paths.append(_extended(path, match, rank))
                    rank += abs(match[1] - match[3])
            paths.append(_Path(rank if end < 0 else rank + _CHUNK, used, -1, following, matches))
        sorted_yet = len(paths) == 1
    paths.sort(key=_rank)
    best = min(paths[:_BEAM], key=lambda path: path.rank if path.end < 0 else path.rank + _CHUNK)
    chosen: list[Match] = []
    rest = best.matches
    while rest is not None:
        match, rest = rest
        chosen.append(match)
    return chosen[::-1]


def _extended(path: _Path, match: Match, rank: int) -> _Path:
    _, used, end, _, matches = path
    kind, reference, reference_words, hypothesis, hypothesis_words = match
    if kind == EXACT:
        rank -= 2 * _COVERED
    else:
        rank -= (reference_words // 2 + hypothesis_words // 2) * _COVERED
    if end >= 0 and end != hypothesis:
        rank += _CHUNK
    used |= ((1 << hypothesis_words) - 1) << hypothesis
    return _Path(rank, used, hypothesis + hypothesis_words, reference + reference_words, (match, matches))


def _without_rival(found: Sequence[Sequence[Match]], words: int) -> list[bool]:
    """For each word of the reference whether its only candidate overlaps no other candidate in either sentence."""
    reference, hypothesis = [0] * len(found), [0] * words
    for options in found:
        for _, first, length, other, other_length in options:
            for place in range(first, first + length):
                reference[place] += 1
            for place in range(other, other + other_length):
                hypothesis[place] += 1
    alone = []
    for options in found:
        if len(options) == 1:
            _, first, length, other, other_length = options[0]
            covers = (*reference[first : first + length], *hypothesis[other : other + other_length])
            alone.append(all(times == 1 for times in covers))
        else:
            alone.append(False)
    return alone
