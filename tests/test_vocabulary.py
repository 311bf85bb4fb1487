"""Captions become ids and captions again."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from captioner.errors import CheckpointError
from captioner.vocabulary import END, PAD, START, UNK, Vocabulary

SPECIAL = [PAD, START, END, UNK]


def vocabulary(*captions, min_count=1):
    return Vocabulary.build(captions, min_count)


def words(caption):
    """The words that a caption is split into."""
    known = vocabulary(caption)
    return known.words(known.encode([caption])[0])


def test_round_trip():
    captions = ["a dog runs on the beach", "two men don't see the man's t-shirt", "they're at five o'clock"]
    known = vocabulary(*captions)
    assert [known.decode(ids) for ids in known.encode(captions)] == captions


def test_start_words_end():
    known = vocabulary("a dog")
    (ids,) = known.encode(["a dog a"])
    a, dog = known.tokenizer.token_to_id("a"), known.tokenizer.token_to_id("dog")
    assert ids == [known.start, a, dog, a, known.end]
    assert len({known.pad, known.start, known.end, known.unk, a, dog}) == len(known) == 6


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Dog.", ["a", "dog"]),
        ("  a\tdog\n runs ", ["a", "dog", "runs"]),
        ('Hello, world! (Really?) -- yes; "no"', ["hello", "world", "really", "yes", "no"]),
        ("don't can't won't isn't", ["do", "n't", "ca", "n't", "wo", "n't", "is", "n't"]),
        ("man's I'm he'd they're we've she'll", "man 's i 'm he 'd they 're we 've she 'll".split()),
        ("the dogs' bowl", ["the", "dogs", "bowl"]),
        ("the man’s hat isn’t red", ["the", "man", "'s", "hat", "is", "n't", "red"]),
        ("a t-shirt at 3.5 o'clock, black/white", ["a", "t-shirt", "at", "3.5", "o'clock", "black/white"]),
        ("the 'real' deal", ["the", "real", "deal"]),
        ("Ein SCHÖNER Café-Gast", ["ein", "schöner", "café-gast"]),
        ("cafe\u0301", ["caf\u00e9"]),  # composed and decomposed letters are one
        ("собака на пляже", ["собака", "на", "пляже"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("a dog 🐕 and © a cat…", ["a", "dog", "and", "a", "cat"]),
        ("50% of $20", ["50", "of", "20"]),
        ("a_b", ["a", "b"]),
        ("", []),
        (" .,!? ", []),
    ],
)
def test_words(caption, expected):
    assert words(caption) == expected


def test_a_caption_without_words_is_start_and_end():
    known = vocabulary("a dog")
    assert known.encode(["", "...", " "]) == [[known.start, known.end]] * 3
    assert known.encode([]) == []
    assert known.decode([known.start, known.end]) == ""


def test_rare_words_are_unknown():
    captions = ["a dog"] * 3 + ["a cat"] * 2 + ["a gnu"]
    known = vocabulary(*captions, min_count=2)
    assert "dog" in known
    assert "cat" in known
    assert "gnu" not in known
    assert len(known) == 4 + 3
    assert known.encode(["a gnu"]) == [[known.start, known.tokenizer.token_to_id("a"), known.unk, known.end]]
    assert len(vocabulary(*captions, min_count=3)) == 4 + 2
    assert len(vocabulary(*captions, min_count=99)) == 4


def test_case_and_accents_count_together():
    assert len(vocabulary("Dog", "dog", "DOG", "caf\u00e9", "cafe\u0301", min_count=2)) == 4 + 2


def test_words_stop_at_end_and_hold_nothing_special():
    known = vocabulary("a dog")
    a, dog = known.tokenizer.token_to_id("a"), known.tokenizer.token_to_id("dog")
    assert known.words([known.start, a, known.unk, dog, known.pad, known.end, a]) == ["a", "dog"]
    assert known.words([a, dog]) == ["a", "dog"]
    assert known.decode([]) == ""


def test_joining_leaves_other_apostrophes_alone():
    known = vocabulary("rock n't 's 'd o'clock 'smile")
    assert known.decode(known.encode(["don't o'clock"])[0]) == "n't o'clock"  # "do" is unknown


def test_long_captions_are_cut_and_do_not_end():
    known = vocabulary("a b c d e")
    a, b, c = (known.tokenizer.token_to_id(word) for word in "abc")
    captions = ["a b", "a b c", "a b c d", ""]
    assert known.encode(captions, max_words=3) == [
        [known.start, a, b, known.end],
        [known.start, a, b, c, known.end],
        [known.start, a, b, c],
        [known.start, known.end],
    ]
    assert known.encode(captions) == [known.encode([caption])[0] for caption in captions]


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_captions_are_words(tmp_path, token):
    text = f"a dog {token} runs"
    known = vocabulary(text, text)
    path = tmp_path / "tokenizer.json"
    known.save(path)
    for each in (known, Vocabulary.load(path)):
        (ids,) = each.encode([text])
        assert [ids[0], ids[-1]] == [each.start, each.end]
        assert not {each.pad, each.start, each.end, each.unk} & set(ids[1:-1])
        assert each.decode(ids) == f"a dog {token[1:-1]} runs"
    assert len(known) == 4 + 4
    (ids,) = vocabulary("a dog runs").encode([text])
    assert len(ids) == 6  # an unknown word at most


def test_special_tokens_come_first_and_once():
    known = vocabulary("[end] [pad] the the")
    assert sorted((known.pad, known.start, known.end, known.unk)) == [0, 1, 2, 3]
    assert known.tokenizer.get_vocab_size() == len(known) == 4 + 3


def test_ids_do_not_depend_on_chance():
    captions = [f"word{n % 50} word{n % 7} common" for n in range(500)]
    code = (
        "import sys; from captioner.vocabulary import Vocabulary; "
        "print(Vocabulary.build(sys.stdin.read().split('\\n'), 1).sha256)"
    )
    for seed in ("1", "2"):
        again = subprocess.run(
            [sys.executable, "-c", code],
            input="\n".join(reversed(captions)),
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert again.stdout.strip() == vocabulary(*captions).sha256


def test_frequent_words_have_low_ids():
    known = vocabulary("b b b", "a a", "c c", "d")
    assert [known.tokenizer.id_to_token(index) for index in range(4, 8)] == ["b", "a", "c", "d"]


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "tokenizer.json"
    known = vocabulary("a dog doesn't run", "Ein schöner Hund")
    known.save(path)
    loaded = Vocabulary.load(path)
    assert len(loaded) == len(known)
    assert loaded.sha256 == known.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.encode(["a dog doesn't"]) == known.encode(["a dog doesn't"])
    assert loaded.decode(loaded.encode(["Schöner Hund"])[0]) == "schöner hund"
    assert vocabulary("a dog doesn't run", "ein schöner hund").sha256 == known.sha256
    assert vocabulary("a dog doesn't run").sha256 != known.sha256


def test_the_file_is_a_standard_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    known = vocabulary("a dog doesn't run")
    known.save(path)
    encoding = Tokenizer.from_file(str(path)).encode("A dog: run!")
    assert encoding.tokens == [START, "a", "dog", "run", END]
    assert encoding.ids == known.encode(["A dog: run!"])[0]
    assert {token["content"] for token in json.loads(path.read_text("utf-8"))["added_tokens"]} == set(SPECIAL)


def test_a_missing_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: no such file; a saved model has its vocabulary there$"
    ):
        Vocabulary.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe\x00", b"not json", b'{"model": 3}'])
def test_a_damaged_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{path}: not a tokenizer\.json \([^\n]+\); fetch the model again$"):
        Vocabulary.load(path)


@pytest.mark.parametrize("token", SPECIAL)
def test_a_tokenizer_of_something_else(tmp_path, token):
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabulary("a dog").to_json().replace(token, "[other]"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"the vocabulary has no \{token}; it was not made by captioner$"):
        Vocabulary.load(path)
