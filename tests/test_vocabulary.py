"""Captions become ids and captions again."""

import hashlib
import json
import os
import subprocess
import sys
import time
import unicodedata
from random import Random

import pytest

from captioner.errors import CaptionerError, CheckpointError
from captioner.files import PRETRAINED
from captioner.vocabulary import _WORD, END, PAD, START, UNK, Vocabulary, split

SPECIAL = [PAD, START, END, UNK]


def vocabulary(*captions, min_count=1):
    return Vocabulary.build(captions, min_count)


def words(caption):
    """The words that a caption is split into."""
    return split(caption)


def test_round_trip():
    captions = ["a dog runs on the beach", "two men don't see the man's t-shirt", "they're at five o'clock"]
    known = vocabulary(*captions)
    assert [known.decode(ids) for ids in known.encode(captions)] == captions


def test_start_words_end():
    known = vocabulary("a dog")
    (ids,) = known.encode(["a dog a"])
    a, dog = known.id_of("a"), known.id_of("dog")
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
    assert known.encode(["a gnu"]) == [[known.start, known.id_of("a"), known.unk, known.end]]
    assert len(vocabulary(*captions, min_count=3)) == 4 + 2


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (["a dog", "a cat"], "the most frequent word is seen 2 times"),
        ([], "they hold no word"),
        (["...", ""], "they hold no word"),
    ],
)
def test_a_vocabulary_without_words_is_refused(captions, said):
    with pytest.raises(CaptionerError, match=rf"no word of the captions is seen 3 times \({said}\); give a lower"):
        Vocabulary.build(captions, min_count=3)


def test_case_and_accents_count_together():
    assert len(vocabulary("Dog", "dog", "DOG", "caf\u00e9", "cafe\u0301", min_count=2)) == 4 + 2


def test_words_stop_at_end_and_hold_nothing_special():
    known = vocabulary("a dog")
    a, dog = known.id_of("a"), known.id_of("dog")
    assert known.words([known.start, a, known.unk, dog, known.pad, known.end, a]) == ["a", "dog"]
    assert known.words([a, dog]) == ["a", "dog"]
    assert known.decode([]) == ""


def test_joining_leaves_other_apostrophes_alone():
    known = vocabulary("rock n't 's 'd o'clock 'smile")
    assert known.decode(known.encode(["don't o'clock"])[0]) == "n't o'clock"  # "do" is unknown


def test_long_captions_are_cut_and_do_not_end():
    known = vocabulary("a b c d e")
    a, b, c = (known.id_of(word) for word in "abc")
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
    assert len(known) == 4 + 3


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
    assert [known.word_of(index) for index in range(4, 8)] == ["b", "a", "c", "d"]


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
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    known = vocabulary("a dog doesn't run")
    known.save(path)
    encoding = tokenizers.Tokenizer.from_file(str(path)).encode("A dog: run!")
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


# The same as the library -------------------------------------------------------------------------------------------


def library_rules():
    """The rules, made with the library."""
    tokenizers = pytest.importorskip("tokenizers")
    normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Lowercase(),
            tokenizers.normalizers.Replace("’", "'"),
        ]
    )
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORD), behavior="removed", invert=True)
    return tokenizers, normalizer, splitter


def test_texts_are_split_as_the_library_splits_them():
    _, normalizer, splitter = library_rules()

    def expected(text):
        return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]

    for point in range(sys.maxunicode + 1):
        if unicodedata.category(chr(point)) not in ("Cs", "Cn"):  # the library may know a later Unicode
            for text in (chr(point), f"a{chr(point)}n't {chr(point)}'s"):
                if point < 0x3000 or point % 97 == 0:
                    assert split(text) == expected(text), hex(point)
    random = Random(0)
    alphabet = "an't's.,-/&: nN'’sSdmrevl0é\u0308\u0301ΣσßİI+[]_end🐕हि"
    for _ in range(20_000):
        text = "".join(random.choices(alphabet, k=random.randint(0, 12)))
        assert split(text) == expected(text), text


def test_the_file_is_the_one_that_the_library_trains():
    tokenizers, normalizer, splitter = library_rules()
    random = Random(1)
    words = [
        "dog",
        "Dog's",
        "isn't",
        "café",
        "CAFE\u0301",
        "ÖL",
        "hund",
        "3.5",
        "t-shirt",
        "собака",
        "zebra",
        "été",
        "b",
    ]
    captions = [" ".join(random.choices(words, range(1, 14), k=8)) for _ in range(60)]
    trainer = tokenizers.trainers.WordLevelTrainer(min_frequency=5, special_tokens=SPECIAL, show_progress=False)
    peer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNK))
    peer.normalizer, peer.pre_tokenizer = normalizer, splitter
    peer.train_from_iterator(captions, trainer)
    peer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, peer.token_to_id(START)), (END, peer.token_to_id(END))]
    )
    known = vocabulary(*captions, min_count=5)
    assert known.to_json() == peer.to_str(pretty=True)
    assert known.encode(captions) == [encoding.ids for encoding in peer.encode_batch(captions)]
    read = tokenizers.Tokenizer.from_str(known.to_json())
    assert known.encode(captions) == [encoding.ids for encoding in read.encode_batch(captions)]


def test_the_model_in_the_box_keeps_its_words():
    path = PRETRAINED / "mini" / "tokenizer.json"
    assert Vocabulary.load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_large_data_set_is_encoded_soon():
    captions = ["A man in a red shirt isn't riding the dog's skateboard on a busy street."] * 60_000
    began = time.process_time()
    known = vocabulary(*captions)
    known.encode(captions)
    assert time.process_time() - began < 6  # a tenth of 600,000 captions, each counted and encoded


# A stranger's file -------------------------------------------------------------------------------------------------


def stranger(path, **words):
    """A tokenizer.json with other words, as {word: id}."""
    tokenizer = json.loads(vocabulary("a dog").to_json())
    tokenizer["model"]["vocab"] |= words
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"cat": 5}, "the words '(a|dog)' and 'cat' have the same id 5"),
        ({"cat": -1}, "the word 'cat' has the id -1; expected 0 to 6"),
        ({"cat": 7}, "the word 'cat' has the id 7; expected 0 to 6"),
        ({"cat": 10**19}, "the word 'cat' has the id 10000000000000000000; expected 0 to 6"),
        ({"cat": 6.0}, "the word 'cat' has the id 6.0"),
        ({"cat": True}, "the word 'cat' has the id True"),
        ({"cat": None}, "the word 'cat' has the id None"),
        ({"": 6}, "the word '', of 0 characters"),
        ({"x" * 201: 6}, "the word 'x+', of 201 characters; expected 1 to 200"),
        ({"\x1b[31mred": 6}, r"the word '.x1b.31mred', which holds a character that cannot be shown"),
        ({"a\nb": 6}, "which holds a character that cannot be shown"),
        ({"a b": 6}, "which holds a character that cannot be shown"),
        ({"\u202edog": 6}, "which holds a character that cannot be shown"),
        ({"\x9bm": 6}, "which holds a character that cannot be shown"),
        ({"\u2028": 6}, "which holds a character that cannot be shown"),
        ({"\ud800": 6}, "which holds a character that cannot be shown"),
    ],
)
def test_words_that_cannot_be(tmp_path, words, said):
    path = stranger(tmp_path / "tokenizer.json", **words)
    with pytest.raises(CheckpointError, match=said) as caught:
        Vocabulary.load(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{path}: ")


def test_a_word_that_stands_twice(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabulary("a dog").to_json().replace('"dog":', '"a":'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"not a tokenizer.json \(the key 'a' twice\); fetch the model again$"):
        Vocabulary.load(path)


def test_the_rules_of_a_stranger_are_not_run(tmp_path):
    tokenizer = json.loads(vocabulary("a dog").to_json())
    tokenizer["pre_tokenizer"]["pattern"]["Regex"] = "(a+)+$"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    known = Vocabulary.load(path)
    assert known.encode(["a" * 50_000 + "!"]) == [[known.start, known.unk, known.end]]
    assert known.to_json() == vocabulary("a dog").to_json()


@pytest.mark.parametrize("part", ["n", "n't", "a-", "a'", "'s", "é'", "n'ts"])
def test_no_text_takes_long(part):
    began = time.process_time()
    split(part * 100_000)
    assert time.process_time() - began < 1


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(CheckpointError, match=r"not a tokenizer.json \(more than 33,554,432 bytes\)"):
        Vocabulary.load(path)
