"""Tokens are the COCO server's."""

import string

import corpora
import peer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioner.metrics import tokenize, tokenize_all
from captioner.metrics.characters import outline
from captioner.metrics.tokenization import PUNCTUATION, _lex, split_words

# What Stanford's PTBTokenizer 3.4.1 makes of these, with the server's punctuation removed; `_` is a no-break space
EXAMPLES = {
    "": "",
    "   ": "",
    "... !": "",
    "A man riding a horse.": "a man riding a horse",
    "Two dogs , one brown , play .": "two dogs one brown play",
    "A man.A dog": "a man.a dog",
    "dog;cat,bird:fish": "dog cat bird fish",
    "What?! Wow!!": "what ?! wow !!",
    "the end..": "the end",
    "an old- fashioned, well-known t-shirt -": "an old fashioned well-known t-shirt",
    "black-and-white 3-year-old": "black-and-white 3-year-old",
    "a (small) [sic] {dog}": "a -lrb- small -rrb- -lsb- sic -rsb- -lcb- dog -rcb-",
    'a "STOP" sign': "a stop sign",
    "a 'STOP' sign": "a stop sign",
    "“quoted” ‘words’ — or – …": "quoted words or",
    "it's the dogs' men's they're I'd we'll I've I'm": "it 's the dogs men 's they 're i 'd we 'll i 've i 'm",
    "it’s don’t": "it 's do n't",
    "don't can't isn't won't DON'T": "do n't ca n't is n't wo n't do n't",
    "I cannot, gonna wanna 'tis 'twas": "i can not gon na wan na 't is 't was",
    "rock'n'roll at 5 o'clock y'all 'em '90s the 1990's": "rock 'n' roll at 5 o'clock y' all 'em '90s the 1990 's",
    "D'Angelo O'Brien l'eau c'mon": "d'angelo o'brien l'eau c'mon",
    "Mr. Smith on St. Paul Ave. vs. Dr. X": "mr. smith on st. paul ave. vs. dr. x",
    "at Main St.": "at main st.",
    "no. 5 and no. no.": "no. 5 and no no",
    "watching T.V. at 5 p.m. in the U.S.": "watching t.v. at 5 p.m. in the u.s.",
    "U.S. The flag": "u.s. the flag",
    "vitamin C. The end": "vitamin c the end",
    "J. Smith": "j. smith",
    "wash. La. la. Wash.": "wash la. la wash.",
    "$5.00 US$5 £3 €2 5¢": "$ 5.00 us$ 5 # 3 $ 2 5 cents",
    "1/2 3 1/2 ½ 1,000 5:30 50% #1 .22": "1/2 3_1/2 1/2 1,000 5:30 50 % # 1 .22",
    "6'2\" 360° 3rd 2x4 9/11/2001": "6 2 360 ° 3rd 2x4 9/11/2001",
    "call 555-1234": "call 555-1234",
    "(555) 123-4567": "-lrb-555-rrb-_123-4567",
    "555-123-4567": "555-123-4567",
    "www.foo.com http://foo.com/a?b me@foo.com @home #tag": "www.foo.com http://foo.com/a?b me@foo.com @home #tag",
    "photo.jpg a/b and/or w/ b&w AT&T": "photo.jpg a/b and/or w / b & w at&t",
    ":) :-( <3 <b>": ":-rrb- :--lrb- < 3 <b>",
    "&amp; &quot;x&quot; &lt;": "& x <",
    "_blank_ a_b *wow* c++ C#": "_ blank _ a_b * wow * c++ c#",
    "café naïve Ünder ñ": "café naïve ünder ñ",
    "soft\u00adhyphen non\u2011breaking": "softhyphen non\u2011breaking",
    "😀 dog 🐶 ☺ ™ ×": "dog ☺ ™ ×",
    "日本 語": "日本 語",
    "a\nb\tc\rd\u00a0e": "a b c d e",
    "1\n1/2 2\t1/2": "1_1/2 2 1/2",
}


@pytest.mark.parametrize(("caption", "tokens"), EXAMPLES.items())
def test_examples(caption, tokens):
    assert tokenize(caption) == [token.replace("_1", "\u00a01") for token in tokens.split()]


def test_full_stop_after_a_letter_depends_on_the_next_caption():
    captions = ["a sign that reads K.", "A dog.", "a sign that reads K.", "dogs", "a sign that reads K."]
    assert [tokens[-1] for tokens in tokenize_all(captions)] == ["k", "dog", "k.", "dogs", "k."]
    assert tokenize(captions[0])[-1] == "k"  # most captions are followed by one that begins with "A"
    assert tokenize(captions[0], following="")[-1] == "k."
    assert tokenize_all([]) == []


def test_tokens_with_spaces_are_several_words():
    assert split_words(["3\u00a01/2", "dogs"]) == ["3", "1/2", "dogs"]
    assert split_words(["two", "dogs"]) == ["two", "dogs"]


@given(st.text(max_size=80))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_clean_tokens(caption):
    tokens = tokenize(caption)
    assert all(tokens)
    assert not PUNCTUATION.intersection(tokens)
    assert " " not in "".join(tokens)
    assert len(outline(caption)) == len(caption)


@given(st.text(alphabet=string.ascii_letters + string.digits + " .,'\"!?-():/&$<>@#", max_size=60))
@settings(deadline=None, max_examples=500)
def test_the_short_cut_for_plain_words_changes_nothing(caption):
    assert tokenize(caption) == _lex(caption, "A ")


def test_ten_thousand_words():
    words = [f"word{'s' * (number % 7)}" for number in range(10_000)]
    assert tokenize(" ".join(words)) == words
    assert tokenize(", ".join(words)) == words
    assert tokenize("é " + " ".join(words)) == ["é", *words]
    assert tokenize("<!a " * 10_000) == ["<", "a"] * 10_000


@pytest.mark.reference
def test_examples_are_what_the_reference_gives(tmp_path):
    captions = [caption for caption in EXAMPLES if not set("\r") & set(caption)]
    assert tokenize_all(captions) == peer.tokenize(captions, tmp_path)


@pytest.mark.reference
def test_made_up_captions(tmp_path):
    captions = corpora.made_up(20_000, seed=1)
    expected = peer.tokenize(captions, tmp_path)
    wrong = [caption for caption, a, b in zip(captions, tokenize_all(captions), expected, strict=True) if a != b]
    assert len(wrong) <= 2, wrong[:20]  # at most 1 in 10,000


@pytest.mark.reference
@pytest.mark.shared
@pytest.mark.parametrize("corpus", [corpora.coco, corpora.flickr8k])
def test_real_captions(corpus, tmp_path):
    captions = [caption for texts in corpus().values() for caption in texts]
    for caption, ours, theirs in zip(captions, tokenize_all(captions), peer.tokenize(captions, tmp_path), strict=True):
        assert ours == theirs, caption
