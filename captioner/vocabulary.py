"""Words <-> ids, in one standard `tokenizer.json` that the `tokenizers` library reads by itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer

from captioner.errors import CheckpointError

PAD, START, END, UNK = "[pad]", "[start]", "[end]", "[unk]"

# Lower-cased words as the Penn Treebank splits them: "don't" is "do n't" and "man's" is "man 's", while "t-shirt",
# "o'clock", "3.5" and "black/white" stay whole. Everything between words is dropped.
_CLITIC = r"'(?:s|m|d|re|ve|ll)(?![\p{L}\p{N}])"
_NOT = r"n't(?![\p{L}\p{N}])"
_PART = rf"(?:(?!{_NOT})[\p{{L}}\p{{M}}\p{{N}}])+"
_WORD = rf"{_NOT}|{_CLITIC}|{_PART}(?:(?!{_CLITIC})[-'.,:/&]{_PART})*"

_ATTACHED = re.compile(r" (n't|'(?:s|m|d|re|ve|ll))(?!\w)")


class Vocabulary:
    """The words that a model knows, and how a caption becomes ids and back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a tokenizer whose vocabulary holds the four special tokens.

        Raises:
            CheckpointError: a special token is missing.
        """
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # an "[end]" that someone wrote into a caption is a word like any other
        self.pad, self.start, self.end, self.unk = (self._special(token) for token in (PAD, START, END, UNK))

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> Vocabulary:
        """Collect the words of captions.

        Args:
            captions: raw text.
            min_count: words seen fewer times become `[unk]`.
        """
        tokenizer = Tokenizer(WordLevel(unk_token=UNK))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace("’", "'")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
        trainer = WordLevelTrainer(
            min_frequency=min_count, special_tokens=[PAD, START, END, UNK], vocab_size=2**31 - 1, show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
        )
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a `tokenizer.json`.

        Raises:
            CheckpointError: the file is missing, is not a tokenizer, or lacks a special token.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; a saved model has its vocabulary there")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise CheckpointError(f"{path}: not a tokenizer.json ({error}); fetch the model again") from None
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of `tokenizer.json`."""
        return str(self.tokenizer.to_str(pretty=True))

    @property
    def sha256(self) -> str:
        """Identifies the vocabulary: equal words, ids and rules give an equal hash."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def __contains__(self, word: str) -> bool:
        return self.tokenizer.token_to_id(word) is not None

    def encode(self, captions: Sequence[str], max_words: int | None = None) -> list[list[int]]:
        """Turn captions into ids, `[start]` first and `[end]` last.

        Args:
            captions: raw text.
            max_words: longer captions are cut there, and then have no `[end]`: the model must not learn to stop early.
        """
        encoded = [list(encoding.ids) for encoding in self.tokenizer.encode_batch(list(captions))]
        if max_words is None:
            return encoded
        return [ids if len(ids) <= max_words + 2 else ids[: max_words + 1] for ids in encoded]

    def words(self, ids: Iterable[int]) -> list[str]:
        """The words of a caption, up to its first `[end]` and without special tokens."""
        found: list[str] = []
        for index in ids:
            if index == self.end:
                break
            if index not in (self.pad, self.start, self.unk):
                found.append(str(self.tokenizer.id_to_token(index)))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, with `n't` and `'s` joined to their words again."""
        return _ATTACHED.sub(r"\1", " ".join(self.words(ids)))

    def _special(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise CheckpointError(f"the vocabulary has no {token}; it was not made by captioner")
        return int(index)
