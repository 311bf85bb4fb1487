"""Document frequencies for CIDEr that can be saved and used again.

CIDEr weighs an n-gram by how few images have it in their references. With one image, or a handful, those
frequencies mean nothing (with one, every score is 0); frequencies of a large corpus give meaningful scores.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from captioner.metrics.ngrams import BASE, ORDERS, IntArray, ReferenceIndex
from captioner.metrics.tokenization import split_words, tokenize_all

_FORMAT = "captioner-idf-1-images"  # the name of the one entry in the metadata: two would be in random order


@dataclass(frozen=True)
class Idf:
    """In how many images of a corpus each n-gram occurs.

    N-grams of a single image are left out: they weigh as much as unseen ones, and are most of a corpus.
    """

    images: int  # images in the corpus
    words: tuple[Hashable, ...]  # the words that occur in more than one image
    keys: tuple[IntArray, ...]  # per order, (ngrams,) sorted `prefix * 2**32 + word`, see `captioner.metrics.ngrams`
    frequency: tuple[IntArray, ...]  # per order, (ngrams,) images that have the n-gram, >= 2

    def __post_init__(self) -> None:
        before = 1
        for n, (keys, frequency) in enumerate(zip(self.keys, self.frequency, strict=True), start=1):
            if len(keys) != len(frequency) or len(keys) >= BASE or (np.diff(keys) <= 0).any():
                raise ValueError(f"document frequencies of {n}-grams are not a sorted table")
            if len(keys) and not (
                keys[0] >= 0
                and keys[-1] // BASE < before
                and (keys % BASE).max() < len(self.words)
                and 2 <= frequency.min() <= frequency.max() <= self.images
            ):
                raise ValueError(f"document frequencies of {n}-grams are out of range")
            before = len(keys)

    @classmethod
    def from_references(cls, references: Mapping[Any, Sequence[str]]) -> Idf:
        """Counts raw references, several per image.

        Raises:
            ValueError: an image has no reference.
        """
        tokens = iter(tokenize_all([text for texts in references.values() for text in texts]))
        return cls.from_tokens(
            {image: [split_words(next(tokens)) for _ in texts] for image, texts in references.items()}
        )

    @classmethod
    def from_tokens(cls, references: Mapping[Any, Sequence[Sequence[Hashable]]]) -> Idf:
        """Counts tokenised references, several per image; tokens are anything hashable, only words can be saved.

        Raises:
            ValueError: there are no images, or one has no reference.
        """
        if not references:
            raise ValueError("there are no references to count")
        index = ReferenceIndex(references)
        old_words = list(index.vocabulary)
        first = index.orders[0].document_frequency  # the unigrams are the words, in the order of their numbers
        kept_words = np.flatnonzero(first > 1)
        new_word = np.full(len(old_words), -1, dtype=np.int64)
        new_word[kept_words] = np.arange(len(kept_words))
        new_prefix = np.zeros(1, dtype=np.int64)
        keys: list[IntArray] = []
        frequency: list[IntArray] = []
        for order in index.orders:
            kept = np.flatnonzero(order.document_frequency > 1)
            # words and prefixes of what is kept are kept themselves: they occur wherever it occurs
            key = new_prefix[order.keys[kept] // BASE] * BASE + new_word[order.keys[kept] % BASE]
            new_prefix = np.full(len(order.keys), -1, dtype=np.int64)
            new_prefix[kept] = np.arange(len(kept))  # renumbering keeps the order, so the keys stay sorted
            keys.append(key)
            frequency.append(order.document_frequency[kept])
        return cls(len(index), tuple(old_words[word] for word in kept_words), tuple(keys), tuple(frequency))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; equal frequencies give equal bytes.

        Raises:
            ValueError: the tokens are not words.
        """
        from safetensors.numpy import save_file

        words = [word for word in self.words if isinstance(word, str) and "\n" not in word]
        if len(words) < len(self.words):
            raise ValueError("only document frequencies of words can be saved; count references tokenised into strings")
        text = np.frombuffer("\n".join(words).encode(), dtype=np.uint8)
        tensors: dict[str, npt.NDArray[np.generic]] = {"words": text}
        for n in range(ORDERS):
            tensors[f"keys_{n + 1}"] = self.keys[n]
            tensors[f"frequency_{n + 1}"] = self.frequency[n].astype(np.int32)
        save_file(tensors, os.fspath(path), metadata={_FORMAT: str(self.images)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Idf:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is missing or is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        try:
            with safe_open(name, framework="numpy") as file:
                metadata = file.metadata() or {}
                if _FORMAT not in metadata:
                    raise ValueError(f"{name} holds no document frequencies; make one with Idf.save")
                words = bytes(file.get_tensor("words")).decode()
                keys = tuple(file.get_tensor(f"keys_{n + 1}") for n in range(ORDERS))
                frequency = tuple(file.get_tensor(f"frequency_{n + 1}").astype(np.int64) for n in range(ORDERS))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be read as document frequencies: {error}") from None
        try:
            return cls(int(metadata[_FORMAT]), tuple(words.split("\n")) if words else (), keys, frequency)
        except ValueError as error:
            raise ValueError(f"{name} is damaged: {error}") from None
