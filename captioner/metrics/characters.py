"""Classes of characters as the reference tokeniser sees them.

The reference is a lexer of 2014: letters that Unicode has gained since are unknown to it, like everything beyond
U+FFFF, and vanish. To keep the rules readable they work on the *outline* of a caption, in which every character
outside ASCII is replaced by one that stands for its class, place by place; tokens are then cut out of the caption.

The ranges below are measured: the reference was asked about each of the 63,000 characters in ten places.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

UPPER, LOWER, MARK, DIGIT, SYMBOL, WIDE = "À", "à", "\u0300", "٠", "§", "\u2003"
UNKNOWN, BEYOND = "\u0001", "\u0002"  # no token begins with either; those beyond U+FFFF count as two characters
"""The characters that stand for each class in an outline."""

# Characters that have rules of their own, and stand for themselves: the no-break space, the soft hyphen, Windows-1252
# quotes and dashes in the control range, quotes, dashes, hyphens, currencies, fractions, super- and subscripts, and
# the ellipsis.
_THEMSELVES = frozenset(
    "\u00a0\u00ad\u0080\u0091\u0092\u0093\u0094\u0096\u0097¢£¤¼½¾«»°²³¹⁰⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉₊₋⁄"
    "\u058a\u2010\u2011\u2013\u2014\u2015‘’‛“”‹›…₠€⅓⅔\u066b\u066c"
)

_WIDE_SPACES = "2000-200a 3000"
_LINE_BREAKS = (
    "85 2028 2029"  # at most of these, \v, \f and \r the reference begins another caption; for us they part words
)

# Not letters to Unicode, but parts of words to the reference: mostly vowel signs and accents
_MARKS = (
    "2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7 "
    "615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955 "
    "962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 "
    "bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44 d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd "
)

# Tokens by themselves
_SYMBOLS = (
    "a1 a5-a9 ac ae-af b1 b4 b6-b8 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f "
    "66a 66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 207c-207e "
    "208c-208e 20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b "
    "2140-2144 214a-214d 214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 "
    "ffe0-ffe1 ffe5-ffe6 "
)

# Letters and digits newer than the reference
_TOO_NEW = (
    "37f 528-52f 560 588 5ef 860-86a 870-887 889-88e 8a1 8ad-8c9 978 980 9fc af9 c34 c5a c5d c80 cdd d04 d54-d56 "
    "d5f de6-def e86 e89 e8c e8e-e93 e98 ea0 ea8-ea9 eac 13f5 13f8-13fd 16f1-16f8 170d 171f 1878 191d-191e "
    "19b0-19c0 19c8-19c9 1b4c 1c80-1c88 1c90-1cba 1cbd-1cbf 1cf2-1cf3 1cfa 2c2f 2c5f 312e-312f 31bb-31bf "
    "4db6-4dbf 9fcd-9fff a698-a69d a78f a794-a79f a7ab-a7ca a7d0-a7d1 a7d3 a7d5-a7d9 a7f2-a7f7 a8fd-a8fe "
    "a9e0-a9e4 a9e6-a9fe aa7e-aa7f ab30-ab5a ab5c-ab69 ab70-abbf "
)


def _expand(ranges: str) -> list[int]:
    """The numbers in hexadecimal ranges such as "41-5a 61"."""
    numbers: list[int] = []
    for span in ranges.split():
        first, _, last = span.partition("-")
        numbers.extend(range(int(first, 16), int(last or first, 16) + 1))
    return numbers


class _Outline(dict[int, str]):
    """A table for `str.translate` that is filled with the characters that occur."""

    def __init__(self) -> None:
        super().__init__({code: chr(code) for code in range(0x20, 0x7F)})
        self.update((code, UNKNOWN) for code in range(0x20))
        self.update({ord("\n"): " "} | {ord(space): "\t" for space in "\t\v\f\r"})
        self[0x7F] = UNKNOWN
        for ranges, stand_in in ((_TOO_NEW, UNKNOWN), (_SYMBOLS, SYMBOL), (_MARKS, MARK)):
            self.update((code, stand_in) for code in _expand(ranges))
        self.update((code, WIDE) for code in _expand(_WIDE_SPACES))
        self.update((code, "\t") for code in _expand(_LINE_BREAKS))
        self.update((ord(character), character) for character in _THEMSELVES)

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        if code > 0xFFFF:
            stand_in = BEYOND
        elif category == "Nd":
            stand_in = DIGIT
        elif category[0] == "L" or code in (0x1885, 0x1886):
            stand_in = UPPER if category == "Lu" else LOWER
        else:
            stand_in = UNKNOWN
        self[code] = stand_in
        return stand_in


@lru_cache(maxsize=1)
def _table() -> _Outline:
    return _Outline()


def outline(caption: str) -> str:
    """The caption with every character outside ASCII replaced by what stands for its class; of the same length."""
    return caption.translate(_table())
