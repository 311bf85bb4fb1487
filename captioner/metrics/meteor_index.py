"""The data of METEOR 1.5 for English: synonyms, base forms, function words and paraphrases.

They are read from the installed `pycocoevalcap` (extra `[meteor]`), in whose jar and paraphrase table they lie, and
are kept as a compact index of about 60 MB in the user's cache, because the table takes many seconds to read. The index
is named after the checksums of both files, is written under another name first and then renamed, and is made anew if
it cannot be read: a process that is killed, or two that make it at once, leave nothing wrong behind.

Phrases are known by 64-bit hashes of their words. Two of the table's 2.6 million phrases would share one with
probability 2e-7; none do.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int32]

LONGEST = 7
"""Words of the longest phrase that has paraphrases."""

_FORMAT = 1  # of the index file; part of its name
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 22  # bytes of the table that are read together
_STALE = 3600  # seconds after which the half-written index of another process is taken for abandoned
_TABLE = "data/paraphrase-en.gz"
_JAR = "meteor-1.5.jar"
_PARTS = {
    "synsets": "synonym/english.synsets",
    "exceptions": "synonym/english.exceptions",
    "function": "function/english.words",
    "prefixes": "nonbreaking/english.prefixes",
}
# Endings and their replacement in the base form: the rules of WordNet's morphy for nouns, verbs and adjectives.
_ENDINGS = [
    rule.split(":")
    for rule in (
        "s: ses:s xes:x zes:z ches:ch shes:sh men:man ies:y es:e es: ed:e ed: ing:e ing: er: est: er:e est:e".split()
    )
]


def _hash(word: bytes) -> int:
    return int.from_bytes(blake2b(word, digest_size=8).digest(), "little")


def _encoded(word: str) -> bytes:
    return word.encode("utf-8", "surrogatepass")


def _find(table: Hashes, wanted: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each of `wanted` stands in a sorted table, and whether it does."""
    place = np.searchsorted(table, wanted)
    place[place == len(table)] = 0
    known = table[place] == wanted if len(table) else np.zeros(len(wanted), np.bool_)
    return place, known


class _WordHashes(dict[bytes, int]):
    """The hash of each word that was asked for."""

    def __missing__(self, word: bytes) -> int:
        value = self[word] = _hash(word)
        return value


def _phrase_hashes(words: Hashes, first: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> Hashes:
    """Hashes of phrases.

    Args:
        words: (words,) the hashes of words in a row.
        first: (phrases,) where in the row each phrase begins.
        length: (phrases,) its words, 1 to `LONGEST`.
    """
    result = words[first]
    for n in range(1, int(length.max(initial=0))):
        longer = np.flatnonzero(length > n)
        result[longer] = result[longer] * _MULTIPLIER + words[first[longer] + n]
    return result


@dataclass(frozen=True)
class Index:
    """The data of METEOR for English."""

    prefixes: str  # words that keep their full stop, see `meteor_words.normaliser`
    function: frozenset[str]  # the words that weigh less
    phrase: Hashes  # (phrases,) sorted; the place of a phrase is its number
    first: Numbers  # (phrases + 1,) where the paraphrases of each phrase begin
    paraphrase: Numbers  # (pairs,) the numbers of paraphrases, in the order of the table
    word: Hashes  # (words,) sorted, of words with synonyms
    first_synset: Numbers  # (words + 1,) where the synsets of each word begin
    synset: Numbers  # (word and synset pairs,)
    form: Hashes  # (forms,) sorted, of irregular forms
    first_base: Numbers  # (forms + 1,) where the base forms of each begin
    base: Hashes  # (form and base pairs,)

    def synsets(self, word: str) -> frozenset[int]:
        """The synsets of a word and of its base forms: those it is an irregular form of, else one by its ending."""
        own = _hash(_encoded(word))
        return frozenset(synset for form in (own, *self._bases(word, own)) for synset in self._own_synsets(form))

    def phrases(self, sentences: Sequence[Sequence[str]]) -> list[list[tuple[int, int, int]]]:
        """The phrases of the table in each sentence: number, first word, words; by first word, then by length."""
        table = _WordHashes()
        row = np.fromiter((table[_encoded(word)] for words in sentences for word in words), np.uint64)
        ends = np.cumsum([len(words) for words in sentences], dtype=np.int64)
        last = np.repeat(ends, [len(words) for words in sentences])  # where the sentence of each word ends
        place = np.arange(len(row), dtype=np.int64)
        found: list[npt.NDArray[np.int64]] = []
        hashes = row.copy()
        for length in range(1, LONGEST + 1):
            if length > 1:
                place = place[place + length <= last[place]]
                hashes[place] = hashes[place] * _MULTIPLIER + row[place + length - 1]
            wanted, back = np.unique(hashes[place], return_inverse=True)
            number, known = _find(self.phrase, wanted)
            hit = known[back]
            found.append(np.column_stack([place[hit], np.full(hit.sum(), length), number[back][hit]]))
        spans = np.concatenate(found)
        spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
        starts = np.concatenate([[0], ends]).tolist()
        edges = np.searchsorted(spans[:, 0], starts).tolist()
        rows = spans.tolist()
        return [
            [(number, at - start, length) for at, length, number in rows[low:high]]
            for start, low, high in zip(starts, edges, edges[1:], strict=False)
        ]

    def paraphrases(self, phrase: int) -> Numbers:
        """The numbers of the paraphrases of a phrase, in the order of the table."""
        return self.paraphrase[self.first[phrase] : self.first[phrase + 1]]

    def _own_synsets(self, word: int) -> list[int]:
        at = int(np.searchsorted(self.word, np.uint64(word)))
        if at == len(self.word) or int(self.word[at]) != word:
            return []
        synsets: list[int] = self.synset[self.first_synset[at] : self.first_synset[at + 1]].tolist()
        return synsets

    def _bases(self, word: str, own: int) -> list[int]:
        at = int(np.searchsorted(self.form, np.uint64(own)))
        if at < len(self.form) and int(self.form[at]) == own:
            bases: list[int] = self.base[self.first_base[at] : self.first_base[at + 1]].tolist()
            return bases
        if word.endswith("ss") or len(word) <= 2:
            return []
        for ending, replacement in _ENDINGS:
            if word.endswith(ending):
                base = _hash(_encoded(word[: -len(ending)] + replacement))
                if self._own_synsets(base):
                    return [base]
        return []


def load(progress: Callable[[int, int], None] | None = None) -> Index:
    """The index of the installed data; it is made first if the cache has none.

    Args:
        progress: called with the bytes of the table read so far and in all, while the index is made.

    Raises:
        ValueError: `pycocoevalcap` is not installed, a file of it is missing or damaged, or the cache is not writable.
    """
    jar, table = _files()
    sums = repr((_jar_sums(jar), _table_sum(table)))
    file = cache_folder() / f"meteor-{_FORMAT}-{blake2b(sums.encode(), digest_size=8).hexdigest()}.npz"
    index = _read(file)
    if index is None:
        _write(file, _build(_jar_texts(jar), table, progress or (lambda done, total: None)))
        index = _read(file)
        if index is None:
            raise ValueError(f"{file} was written but cannot be read; check the disk, or set XDG_CACHE_HOME to another")
    return index


def cache_folder() -> Path:
    """Where the index is kept: `captioner` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner"


def _package() -> ModuleSpec | None:
    return importlib.util.find_spec("pycocoevalcap")


def _files() -> tuple[Path, Path]:
    spec = _package()
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "meteor needs the data of pycocoevalcap, which is not installed; install it: "
            "pip install 'captioner[meteor]'"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "meteor"
    for file in (folder / _JAR, folder / _TABLE):
        if not file.is_file():
            raise _damaged(file, "is missing")
    return folder / _JAR, folder / _TABLE


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(
        f"{file} {what}; expected the file of pycocoevalcap 1.2, install it again: "
        "pip install --force-reinstall --no-deps pycocoevalcap"
    )


def _jar_sums(jar: Path) -> list[int]:
    """The checksums of the texts that are needed of the jar."""
    try:
        with zipfile.ZipFile(jar) as archive:
            return [archive.getinfo(part).CRC for part in _PARTS.values()]
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise _damaged(jar, f"cannot be read ({error})") from None


def _jar_texts(jar: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(jar) as archive:
            return {name: archive.read(part).decode() for name, part in _PARTS.items()}
    except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError, zlib.error) as error:
        raise _damaged(jar, f"cannot be read ({error})") from None


def _table_sum(table: Path) -> tuple[int, bytes]:
    """The size of the table, and the checksum and length of its content that stand at the end of a gzip file."""
    try:
        with table.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 8))
            return size, file.read()
    except OSError as error:
        raise _damaged(table, f"cannot be read ({error})") from None


def _build(
    texts: dict[str, str], table: Path, progress: Callable[[int, int], None]
) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of an index."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        name: np.frombuffer(texts[name].encode(), np.uint8) for name in ("prefixes", "function")
    }
    try:
        arrays |= _phrase_arrays(table, progress)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _damaged(table, f"cannot be read ({error})") from None

    lines = texts["synsets"].split("\n")
    synsets = {_hash(word.encode()): [int(n) for n in numbers.split()] for word, numbers in _pairs(lines)}
    arrays["word"], arrays["first_synset"], arrays["synset"] = _lists(synsets, np.int32)
    bases: dict[int, list[int]] = {}
    for base, forms in _pairs(texts["exceptions"].split("\n")):
        for form in forms.split():
            bases.setdefault(_hash(form.encode()), []).append(_hash(base.encode()))
    arrays["form"], arrays["first_base"], arrays["base"] = _lists(bases, np.uint64)
    return arrays


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    return zip(lines[::2], lines[1::2], strict=False)


def _lists(table: dict[int, list[int]], kind: type[np.generic]) -> tuple[Hashes, Numbers, npt.NDArray[np.generic]]:
    """A table as its sorted keys, where the list of each begins, and the lists in a row."""
    keys = sorted(table)
    first = np.cumsum([0, *(len(table[key]) for key in keys)]).astype(np.int32)
    return np.array(keys, np.uint64), first, np.array([item for key in keys for item in table[key]], kind)


def _phrase_arrays(table: Path, progress: Callable[[int, int], None]) -> dict[str, npt.NDArray[np.generic]]:
    """Reads the paraphrase table: three lines a pair, a probability (not used), a phrase, a paraphrase of it."""
    words = _WordHashes()

    def hashes(phrases: list[bytes]) -> Hashes:
        row = b" ".join(phrases).split(b" ")
        length = np.fromiter((phrase.count(b" ") + 1 for phrase in phrases), np.int64, len(phrases))
        values = np.fromiter(map(words.__getitem__, row), np.uint64, len(row))
        return _phrase_hashes(values, np.cumsum(length) - length, length)

    sources: list[Hashes] = []  # a phrase once, where its paraphrases stand in a row as they do
    targets: list[Hashes] = []
    times: list[npt.NDArray[np.int64]] = []  # paraphrases of each source
    last = None
    for lines in _lines(table, progress):
        phrases = lines[1::3]
        new = [n for n, (phrase, before) in enumerate(zip(phrases, [last, *phrases], strict=False)) if phrase != before]
        if not new or new[0] != 0:  # goes on from the block before
            times[-1][-1] += new[0] if new else len(phrases)
        if new:
            sources.append(hashes([phrases[n] for n in new]))
            times.append(np.diff([*new, len(phrases)]))
        targets.append(hashes(lines[2::3]))
        last = phrases[-1]
    source = np.concatenate(sources)
    phrase, number = np.unique(np.concatenate([source, *targets]), return_inverse=True)
    number = number.astype(np.int32)
    of_pair = np.repeat(number[: len(source)], np.concatenate(times))
    first = np.zeros(len(phrase) + 1, np.int32)
    np.cumsum(np.bincount(of_pair, minlength=len(phrase)), out=first[1:])
    return {"phrase": phrase, "first": first, "paraphrase": number[len(source) :][np.argsort(of_pair, kind="stable")]}


def _lines(table: Path, progress: Callable[[int, int], None]) -> Iterator[list[bytes]]:
    """The lines of the table, many at a time, three for each pair."""
    size = table.stat().st_size
    with table.open("rb") as packed, gzip.open(packed) as file:
        lines: list[bytes] = []
        rest = b""
        while block := file.read(_BLOCK):
            *whole, rest = (rest + block).split(b"\n")
            lines += whole
            ready = len(lines) // 3 * 3
            if ready:
                yield lines[:ready]
            lines = lines[ready:]
            progress(packed.tell(), size)
        if lines or rest:
            raise ValueError("it ends in the middle of a pair")


def _read(file: Path) -> Index | None:
    """The index in a file; None if there is none or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        prefixes, function = (bytes(found.pop(name)).decode() for name in ("prefixes", "function"))
        return Index(prefixes=prefixes, function=frozenset(function.split()), **found)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error, struct.error):
        return None


def _write(file: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    """Writes an index that is there whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(".meteor-*.part"):  # of processes that were killed
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix=".meteor-", suffix=".part", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as part:
                np.savez(part, **arrays)  # type: ignore[arg-type]  # the stub takes them for options
                part.flush()
                os.fsync(part.fileno())
            Path(name).replace(file)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({error.strerror}); meteor keeps an index of 60 MB there, "
            "set XDG_CACHE_HOME to a folder that can hold it"
        ) from None
