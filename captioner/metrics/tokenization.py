"""Tokens as on the COCO caption server: Stanford's PTBTokenizer 3.4.1, lower case, with its punctuation removed.

A caption is read from left to right. At every place each rule that can begin there is tried; the one that reaches
furthest wins, what it must see behind the token included, and of equals the first. The reference works so too (it is
a lexer made by JFlex), which is why a list of rules, and not a chain of substitutions such as NLTK's
`TreebankWordTokenizer`, follows it to the last abbreviation; see docs/metrics.md. The rules were found by asking the
reference about every character, every word of up to four letters and many thousands of altered captions.

Most words need no rules at all: what a piece between spaces becomes is remembered, see `tokenize`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from captioner.metrics.characters import outline
from captioner.metrics.rules import is_abbreviation, rules

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""The tokens that the server removes. It lower-cases brackets first, so they stay: `-lrb-` is scored like a word."""

_SPACES = re.compile("[ \\t\u00a0\u2003]+")
_PLAIN_WORD = re.compile("[A-Za-zÀà]+(?= )")
_PLAIN_PIECE = re.compile("([A-Za-z]+)([.,!?;:]?)")
_JOINED_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])

# Where a rule may look across a space: numbers in a row, full stops in a row, and a full stop behind what can be an
# acronym or an abbreviation that depends on the word behind, or that can be the end of a split word, as in `R&B.`
_OPEN = r"(?:(?<![A-Za-z])(?:[A-Za-z]|(?i:ca|figs?|prop|nos?|art|bldg|pp|op|p?pt[ey]))|[^A-Za-z ][A-Za-z]*)\."
_NUMBERS_ACROSS = re.compile("[0-9][^ ]* +[0-9(+]")
_STOPS_ACROSS = re.compile(rf"\. +\.|{_OPEN} ")
_STOP_AT_END = re.compile(rf"{_OPEN}$")


def _lex(caption: str, following: str) -> list[str]:
    """The tokens of a caption, by the rules."""
    caption = caption.replace("\n", " ")
    shape = f"{outline(caption)}\n{outline(following)}\n"
    by_first = rules()
    tokens: list[str] = []
    place = 0
    while place < len(caption):
        character = shape[place]
        if character in " \t":
            place = _SPACES.match(shape, place).end()  # type: ignore[union-attr]  # one is there
            continue
        plain = _PLAIN_WORD.match(shape, place)
        if plain is not None:
            word = caption[place : plain.end()].lower()
            if word not in _JOINED_WORDS:
                tokens.append(word)
                place = plain.end()
                continue
        kind = "a" if character.isalpha() else "1" if character.isdecimal() else "."
        if character == "<" and shape.find(">", place) >= 0:  # else a row of opened tags would be read to the end each
            kind = "<"
        furthest, size, chosen = place, 1, None
        for rule in by_first[kind]:
            match = rule.pattern.match(shape, place)
            if match is None or match.end() <= furthest:
                continue
            if rule.accept is None or rule.accept(match[1]):
                furthest, size, chosen = match.end(), match.end(1) - place, rule
        if chosen is not None:
            size -= chosen.keep
            tokens.append(chosen.clean(caption[place : place + size]).lower())
        place += size  # a character that begins no token vanishes
    if tokens:
        tokens[-1] = tokens[-1].rstrip()
    return [token for token in tokens if token not in PUNCTUATION]


@lru_cache(maxsize=1 << 16)
def _piece(text: str) -> tuple[str, ...]:
    """The tokens of what stands between two spaces."""
    plain = _PLAIN_PIECE.fullmatch(text)
    if plain is not None:
        word = plain[1].lower()
        if word not in _JOINED_WORDS and not (plain[2] == "." and is_abbreviation(text)):
            return (word,)
    return tuple(_lex(text, "A "))


def tokenize(caption: str, *, following: str = "A ") -> list[str]:
    """Splits a caption into lower-case tokens without punctuation.

    Args:
        caption: any text. Line breaks count as spaces.
        following: how the next caption of the file begins, or "" for the last one. The reference reads a file of
            captions at a stretch, and takes a full stop after a letter for the end of a sentence when a word such as
            "A" or "The" comes next: `a sign that reads K.` ends in `k` there, and else in `k.`.

    Returns:
        The tokens; none for a caption without words. A token can hold a no-break space: `3 1/2` is one.
    """
    text = caption.rstrip(" ")
    if (
        not (text.isascii() and text.isprintable())
        or "<" in text
        or _NUMBERS_ACROSS.search(text)
        or (". " in text and _STOPS_ACROSS.search(text))
        or (following != "A " and text.endswith(".") and _STOP_AT_END.search(text, text.rfind(" ") + 1))
    ):
        return _lex(caption, following)
    tokens: list[str] = []
    for piece in text.split():
        tokens += _piece(piece)
    return tokens


def tokenize_all(captions: Sequence[str]) -> list[list[str]]:
    """Splits the captions of a file, each with a view of the next one, exactly as the reference does."""
    following = [*captions[1:], ""]
    return [tokenize(caption, following=following[number]) for number, caption in enumerate(captions)]


def split_words(tokens: Sequence[str]) -> Sequence[str]:
    """Tokens, split where they hold a space: to BLEU and CIDEr `3 1/2` is two words, to ROUGE-L it is one."""
    text = " ".join(tokens)
    return tokens if text.isascii() else text.split()
