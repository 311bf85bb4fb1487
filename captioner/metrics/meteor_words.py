"""The words that METEOR 1.5 compares: a caption normalised as `meteor-1.5.jar -l en -norm` does it.

The rules follow the tokeniser of Moses (Koehn et al., ACL 2007) with four of METEOR's own: typographic quotes and
dashes become plain ones, a dash between two words parts them, acronyms lose their dots (`U.S.` is `us`), and
punctuation stays. They were found by asking the jar about every character of the Basic Multilingual Plane in many
places, and then about altered captions until no difference was left; see docs/metrics.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

# Characters that belong to words; any other is a word by itself unless a rule below says otherwise.
_LETTERS = "A-Za-zÀ-ÖØ-öø-žЀ-ԧᴀ-ᵿꙀ-ꙮ꙾-ꚗ"
_SPACE = " \\t\\n\\v\\f\\r"

_Rule = tuple[re.Pattern[str], str]


def _rules(*rules: tuple[str, str]) -> Sequence[_Rule]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


# An apostrophe in the eyes of the rules; other typographic marks are words by themselves until the end.
_APOSTROPHES = str.maketrans("‘’", "''")
_TYPOGRAPHIC = str.maketrans("“”–\u00a0\u202f\u205f\u3000", '""-    ') | dict.fromkeys(range(0x2000, 0x200B), " ")
_OTHER = re.compile(rf"([^{_LETTERS}0-9{_SPACE}.'`,-])")
_DOTS = re.compile(r"\.(\.+)")
_MARKS = _rules(
    (r"([^0-9]),([^0-9])", r"\1 , \2"),
    (r"([0-9]),([^0-9])", r"\1 , \2"),
    (r"([^0-9]),([0-9])", r"\1 , \2"),
    (r"--", "-"),
    (r"`", "'"),
    (r"''", ' " '),
    (rf"([^{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
    (rf"([^{_LETTERS}0-9])'([{_LETTERS}])", r"\1 ' \2"),
    (rf"([{_LETTERS}])'([^{_LETTERS}])", r"\1 ' \2"),
    (rf"([{_LETTERS}])'([{_LETTERS}])", r"\1 '\2"),
    (r"([0-9])'(s)", r"\1 '\2"),
    (rf"([{_LETTERS}0-9.])-([{_LETTERS}0-9])", r"\1 \2"),
)
_HAS_LETTER = re.compile(f"[{_LETTERS}]")
_PLAIN = re.compile("[a-z ]*")  # most captions, which no rule changes
_SEPARATORS = re.compile("[ \t\n\r\f]+")
_CONTROLS = "".join(map(chr, range(0x21)))  # trimmed at both ends


def normaliser(prefixes: str) -> Callable[[str], list[str]]:
    """The function from a line to its words.

    Args:
        prefixes: the text of the jar's `nonbreaking/english.prefixes`: words that keep the full stop behind them, one a
            line; those marked `#NUMERIC_ONLY#` keep it before a number.
    """
    lines = [line.strip() for line in prefixes.splitlines() if line.strip() and not line.startswith("#")]
    numeric = frozenset(line.split()[0] for line in lines if line.endswith("#NUMERIC_ONLY#"))
    always = frozenset(line for line in lines if not line.endswith("#NUMERIC_ONLY#"))

    def parted(word: str, following: str) -> list[str]:
        """A word that ends in a full stop: without it, with it, or with it as a word of its own."""
        stem = word[:-1]
        if "." in stem and _HAS_LETTER.search(stem):
            return [word.replace(".", "")]
        if stem in always or "a" <= following[:1] <= "z" or (stem in numeric and "0" <= following[:1] <= "9"):
            return [word]
        return [stem, "."]

    def normalise(line: str) -> list[str]:
        if _PLAIN.fullmatch(line):
            return line.split()
        text = _OTHER.sub(r" \1 ", line.strip(_CONTROLS).translate(_APOSTROPHES))
        text = f" {_DOTS.sub(lambda run: f' {run[0]} ', text)} "
        for pattern, replacement in _MARKS:
            text = pattern.sub(replacement, text)
        words = [word for word in _SEPARATORS.split(text) if word]
        parts: list[str] = []
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word.endswith(".") and word.strip("."):
                parts += parted(word, following)
            else:
                parts.append(word)
        text = " ".join(parts).translate(_TYPOGRAPHIC).strip(_CONTROLS).lower()
        return [word for word in text.split(" ") if word]

    return normalise


@lru_cache(maxsize=1 << 16)
def java_hash(word: str) -> int:
    """`String.hashCode` of Java, 0 to 2^32 - 1: METEOR takes two words for equal when their hashes are."""
    value = 0
    units = word.encode("utf-16-le", "surrogatepass")
    for low, high in zip(units[::2], units[1::2], strict=True):
        value = (value * 31 + low + 256 * high) & 0xFFFFFFFF
    return value
