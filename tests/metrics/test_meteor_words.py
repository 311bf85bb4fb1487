"""Captions are normalised for METEOR as its jar does it: cases by hand; `test_meteor_equal.py` asks the jar itself."""

import pytest
from small_meteor import PREFIXES

from captioner.metrics.meteor_words import java_hash, normaliser

normalise = normaliser(PREFIXES)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a man riding a horse", "a man riding a horse"),
        ("A Man, Riding.", "a man , riding ."),
        ("the U.S. and e.g. Ph.D. work", "the us and eg phd work"),
        ("Mr. Smith vs. Jones", "mr. smith vs. jones"),
        ("No. 5 and No. Five", "no. 5 and no . five"),
        ("the end. Then the end. then", "the end . then the end. then"),
        ("a black-and-white x-y-z", "a black and white x y-z"),  # the last as the jar has it
        ("five-year-old -lrb- left -rrb-", "five year old -lrb- left -rrb-"),
        ("don't 1990's dogs' 'tis", "don 't 1990 's dogs ' ' tis"),
        ("1,000 and 5.5 but a,b and 1, 2", "1,000 and 5.5 but a , b and 1 , 2"),
        ("well ... then..so", "well ... then .. so"),
        ("“so” ‘it’ – ``is'' — a--b", '" so " \' it \' - " is " — a b'),
        ("$5 for 50% #1 a_b", "$ 5 for 50 % # 1 a _ b"),
        ("café Ünï Ж", "café ünï ж"),
        ("日本 😀", "日 本 😀"),
        ("a\u00a0b\u2003c\td", "a b c d"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_by_hand(caption, words):
    assert " ".join(normalise(caption)) == words


def test_words_are_equal_where_their_hashes_in_java_are():
    assert java_hash("") == 0
    assert java_hash("hello") == 99162322
    assert java_hash("aÿ") == java_hash("bà")  # which METEOR takes for the same word
    assert java_hash("😀") == 0xD83D * 31 + 0xDE00  # Java counts in UTF-16
    assert java_hash("a" * 50) < 1 << 32
