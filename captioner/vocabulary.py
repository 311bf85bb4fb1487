"""Words <-> ids, in one standard `tokenizer.json`.

The file is written such that the `tokenizers` library reads it and encodes equally. It is read here without that
library: the words alone are taken from it, since the rules are those of this module, and a regular expression in a
stranger's file is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from captioner import files
from captioner.errors import CaptionerError, CheckpointError

PAD, START, END, UNK = "[pad]", "[start]", "[end]", "[unk]"
_SPECIAL = (PAD, START, END, UNK)

_LARGEST = 32 << 20  # bytes of a tokenizer.json: a million words fit
_MOST = 1_000_000  # words
_LONGEST = 200  # characters of a word

# Lower-cased words as the Penn Treebank splits them: "don't" is "do n't" and "man's" is "man 's", while "t-shirt",
# "o'clock", "3.5" and "black/white" stay whole. Everything between words is dropped. This is the rule as it stands in
# the file, for other programs.
_CLITIC = r"'(?:s|m|d|re|ve|ll)(?![\p{L}\p{N}])"
_NOT = r"n't(?![\p{L}\p{N}])"
_PART = rf"(?:(?!{_NOT})[\p{{L}}\p{{M}}\p{{N}}])+"
_WORD = rf"{_NOT}|{_CLITIC}|{_PART}(?:(?!{_CLITIC})[-'.,:/&]{_PART})*"

# The same rule for `re`, which knows no \p{L}: it is applied to the *outline* of a text, in which every letter or
# number beyond ASCII is "0", every mark that combines with the letter before it "+", and everything else a space.
_PLAIN_PART = r"(?:[a-mo-z0-9+]+|n(?!'t(?![a-z0-9])))+"
_PLAIN_WORD = re.compile(
    r"n't(?![a-z0-9])|'(?:s|m|d|re|ve|ll)(?![a-z0-9])"
    rf"|{_PLAIN_PART}(?:(?!'(?:s|m|d|re|ve|ll)(?![a-z0-9]))[-'.,:/&]{_PLAIN_PART})*"
)

_ATTACHED = re.compile(r" (n't|'(?:s|m|d|re|ve|ll))(?!\w)")


class _Outline(dict[int, str]):
    """Code point -> its character in the outline; filled as characters are met."""

    def __missing__(self, point: int) -> str:
        character = chr(point)
        if character.isascii():
            self[point] = " " if character == "+" else character
        else:
            self[point] = {"L": "0", "N": "0", "M": "+"}.get(unicodedata.category(character)[0], " ")
        return self[point]


_outline = _Outline()


def split(caption: str) -> list[str]:
    """The words of a caption, lower-cased, by the rule above."""
    if caption.isascii():
        text = caption.lower()
        return _PLAIN_WORD.findall(text.replace("+", " ") if "+" in text else text)
    # A sigma at the end of a word stays the ordinary one, since letters are lower-cased one by one in `tokenizers`.
    text = unicodedata.normalize("NFC", caption).replace("Σ", "σ").lower().replace("’", "'")
    return [text[found.start() : found.end()] for found in _PLAIN_WORD.finditer(text.translate(_outline))]


def join(words: Iterable[str]) -> str:
    """The text of words, with `n't` and `'s` joined to the words before them again."""
    text = " ".join(words)
    return _ATTACHED.sub(r"\1", text) if "'" in text else text


class Vocabulary:
    """The words that a model knows, and how a caption becomes ids and back."""

    def __init__(self, words: Sequence[str]) -> None:
        """Number words from 0 on.

        Args:
            words: each once, the four special tokens among them.

        Raises:
            CheckpointError: a special token is missing, or a word is there twice, is too long, or could not be shown.
        """
        if len(words) > _MOST:
            raise CheckpointError(f"the vocabulary has {len(words):,} words; expected {_MOST:,} at most")
        self._words = list(words)
        self._ids = {word: index for index, word in enumerate(self._words)}
        for word in self._words:
            if fault := _fault(word):
                raise CheckpointError(f"the vocabulary has the word {word[:40]!r}, {fault}; fetch the model again")
        if len(self._ids) < len(self._words):
            twice = next(word for index, word in enumerate(self._words) if self._ids[word] != index)
            raise CheckpointError(f"the vocabulary has the word {twice[:40]!r} twice; fetch the model again")
        self.pad, self.start, self.end, self.unk = (self._special(token) for token in _SPECIAL)
        self._silent = frozenset((self.pad, self.start, self.unk))
        self._plain = {word: index for word, index in self._ids.items() if word not in _SPECIAL}

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> Vocabulary:
        """Collect the words of captions: the special tokens, then the most frequent first, then by the alphabet.

        Args:
            captions: raw text.
            min_count: words seen fewer times become `[unk]`, and so do words of more than 200 characters.

        Raises:
            CaptionerError: no word is left.
        """
        counts: Counter[str] = Counter()
        for caption in captions:
            counts.update(split(caption))
        kept = [word for word, count in counts.items() if count >= min_count and len(word) <= _LONGEST]
        if not kept:
            most = f"the most frequent word is seen {max(counts.values()):,} times" if counts else "they hold no word"
            raise CaptionerError(
                f"no word of the captions is seen {min_count:,} times ({most}); give a lower --min-count"
            )
        kept.sort(key=lambda word: (-counts[word], word))
        return cls([*_SPECIAL, *kept[: _MOST - len(_SPECIAL)]])

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read the words of a `tokenizer.json`.

        Raises:
            CheckpointError: the file is missing, is not a tokenizer, lacks a special token, or has words or ids that
                cannot be.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a saved model has its vocabulary there")
        try:
            words = _words(files.read_json(path, _LARGEST))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: not a tokenizer.json ({error}); fetch the model again") from None
        try:
            return cls(words)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of `tokenizer.json`, byte for byte as the `tokenizers` library writes it."""

        def special(token: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": token, "type_id": 0}}

        def sequence(name: str, number: int) -> dict[str, Any]:
            return {"Sequence": {"id": name, "type_id": number}}

        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": self._ids[token], "content": token, **flags}
                for token in sorted(_SPECIAL, key=self._ids.__getitem__)
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFC"},
                    {"type": "Lowercase"},
                    {"type": "Replace", "pattern": {"String": "’"}, "content": "'"},
                ],
            },
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Removed", "invert": True},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [special(START), sequence("A", 0), special(END)],
                "pair": [sequence("A", 0), sequence("B", 1)],
                "special_tokens": {
                    token: {"id": token, "ids": [self._ids[token]], "tokens": [token]} for token in (END, START)
                },
            },
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": UNK},
        }
        return json.dumps(tokenizer, indent=2, ensure_ascii=False)

    @property
    def sha256(self) -> str:
        """Identifies the vocabulary: equal words, ids and rules give an equal hash."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def id_of(self, word: str) -> int | None:
        """The number of a word; None: it is not in the vocabulary."""
        return self._ids.get(word)

    def word_of(self, index: int) -> str:
        """The word of a number."""
        return self._words[index]

    def encode(self, captions: Iterable[str], max_words: int | None = None) -> list[list[int]]:
        """Turn captions into ids, `[start]` first and `[end]` last.

        An "[end]" that someone wrote into a caption is a word like any other.

        Args:
            captions: raw text.
            max_words: longer captions are cut there, and then have no `[end]`: the model must not learn to stop early.
        """
        encoded: list[list[int]] = []
        find, unknown = self._plain.get, self.unk
        for caption in captions:
            ids = [find(word, unknown) for word in split(caption)]
            if max_words is None or len(ids) <= max_words:
                encoded.append([self.start, *ids, self.end])
            else:
                encoded.append([self.start, *ids[:max_words]])
        return encoded

    def words(self, ids: Iterable[int]) -> list[str]:
        """The words of a caption, up to its first `[end]` and without special tokens."""
        found: list[str] = []
        for index in ids:
            if index == self.end:
                break
            if index not in self._silent:
                found.append(self._words[index])
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, with `n't` and `'s` joined to their words again."""
        return join(self.words(ids))

    def _special(self, token: str) -> int:
        if token not in self._ids:
            raise CheckpointError(f"the vocabulary has no {token}; it was not made by captioner")
        return self._ids[token]


def _words(tokenizer: Any) -> list[str]:
    """The words in a `tokenizer.json`, in the order of their ids.

    Raises:
        ValueError: there are none, or their ids are not 0, 1, 2 and so on.
    """
    model = tokenizer.get("model") if isinstance(tokenizer, dict) else None
    if not isinstance(model, dict) or model.get("type", "WordLevel") != "WordLevel":
        raise ValueError("no model of the type WordLevel")
    ids = model.get("vocab")
    if not isinstance(ids, dict):
        raise ValueError("no words")
    words: dict[int, str] = {}
    for word, index in ids.items():
        if type(index) is not int or not 0 <= index < len(ids):
            raise ValueError(f"the word {word[:40]!r} has the id {index!r:.40}; expected 0 to {len(ids) - 1}")
        if index in words:
            raise ValueError(f"the words {words[index][:40]!r} and {word[:40]!r} have the same id {index}")
        words[index] = word
    return [words[index] for index in range(len(words))]


def _fault(word: str) -> str:
    """The reason why a word cannot be in a vocabulary, or nothing."""
    if not word or len(word) > _LONGEST:
        return f"of {len(word):,} characters; expected 1 to {_LONGEST}"
    # Controls, escapes of terminals, marks that turn the direction of writing, halves of characters, white space.
    if (word.isascii() and word.isprintable() and " " not in word) or all(
        unicodedata.category(each) not in ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs") for each in word
    ):
        return ""
    return "which holds a character that cannot be shown"
