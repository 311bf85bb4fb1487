"""A library of a million photos: how long a run takes to find that all is done, to index, and to search.

    python -m benchmarks.library [--count 1000000] [--folder DIR]

The photos are empty files, a thousand a folder, and their captions are made up: words of the model in the box, the
likelier the more common they are. Each stage is measured in a process of its own, which has read nothing before; with
`--folder`, the files and the library are kept for another time.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report
from captioner.bulk import index, sources
from captioner.bulk.job import Job
from captioner.bulk.journal import Found, Journal, Result
from captioner.files import PRETRAINED
from captioner.vocabulary import Vocabulary

#: Kinds of queries, and an example of each.
QUERIES = {
    "common word": "man",
    "rare word": "zebra",
    "two common words": "man dog",
    "words of which one is rare": "man zebra",
    "a word in many forms": "running",
    "phrase": '"a man in a"',
    "phrase of a rare word": '"zebra on the"',
    "or": "zebra OR giraffe",
    "or of common words": "man OR dog OR water",
    "not": "man NOT dog",
    "rare but for common words": "zebra NOT man",
    "nothing": "man zebra giraffe guitar",
    "words of grammar": "on the",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage", choices=_STAGES)
    arguments = parser.parse_args()
    if arguments.stage:
        print(repr(_STAGES[arguments.stage](arguments.folder, arguments.count)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        found: dict[str, Any] = {}
        for stage in _STAGES:
            command = [sys.executable, "-m", "benchmarks.library", "--stage", stage, "--count", str(arguments.count)]
            done = subprocess.run([*command, "--folder", str(folder)], check=True, stdout=subprocess.PIPE, text=True)
            print(f"{stage}: {done.stdout.strip()}", flush=True)
            found[stage] = done.stdout.strip()
    report(f"{arguments.count:,} photos that are done; seconds of processor time, milliseconds a query", ours=found)


def _job(folder: Path) -> Job:
    return Job(photos=(str(folder / "photos"),), output=folder / "library.db", quiet=True)


def _make(folder: Path, count: int) -> float:
    """Make files and their captions, unless they are there."""
    for first in range(0, count, 1000):
        place = folder / "photos" / f"{first // 1000:04}"
        if place.is_dir():
            continue
        place.mkdir(parents=True)
        for number in range(first, min(first + 1000, count)):
            (place / f"IMG_{number:07}.jpg").touch()
    return _caption(folder)


def _caption(folder: Path) -> float:
    """Caption the photos that have no captions yet."""
    chance, words = random.Random(0), _words()
    began = time.process_time()
    with Journal(folder / "library.db", {}) as journal:
        results: list[Result] = []
        for each in journal.todo(sources.find(_job(folder)), retry_failed=False, by_content=False):
            captions = [Found(_sentence(chance, words), -9.0, -1.0 - chance.random()) for _ in range(3)]
            results.append((each, captions, None, "2026-01-01T00:00:00+00:00"))
            if len(results) == 256:
                journal.record(results)
                results = []
        journal.record(results)
        journal.complete()
    return time.process_time() - began


def _words() -> list[str]:
    vocabulary = Vocabulary.load(PRETRAINED / "mini" / "tokenizer.json")
    known = [vocabulary.word_of(number) for number in range(len(vocabulary))]
    common = "man dog woman people water two grass standing running sitting white black street".split()
    return common + [word for word in known if word.isalpha() and word not in common]


def _sentence(chance: random.Random, words: list[str]) -> str:
    """A sentence of four words by Zipf's law, with words of grammar between them."""
    picked = [words[min(int(len(words) ** chance.random()), len(words) - 1)] for _ in range(4)]
    return f"a {picked[0]} {chance.choice(['in a', 'on the', 'with'])} {picked[1]} {picked[2]} on the {picked[3]}"


def _start(folder: Path, count: int) -> float:
    """Find that all photos are done."""
    began = time.process_time()
    with Journal(folder / "library.db", {}) as journal:
        left = sum(1 for _ in journal.todo(sources.find(_job(folder)), retry_failed=False, by_content=False))
        journal.complete()
        assert (left, journal.counts.known) == (0, count)
    return time.process_time() - began


def _index(folder: Path, count: int) -> float:
    """Index all captions."""
    with Journal(folder / "library.db", {}) as journal:
        journal._execute("DELETE FROM settings WHERE name='indexed'")
        journal._execute("DROP TABLE IF EXISTS search")
        began = time.process_time()
        index.build(journal)
        return time.process_time() - began


def _index_more(folder: Path, count: int) -> float:
    """Index a photo more."""
    (folder / "photos" / "one more.jpg").touch()
    _caption(folder)
    with Journal(folder / "library.db", {}) as journal:
        began = time.process_time()
        index.build(journal)
        taken = time.process_time() - began
    (folder / "photos" / "one more.jpg").unlink()
    _caption(folder)
    return taken


def _search(folder: Path, count: int) -> dict[str, float]:
    """Milliseconds of each kind of query; the median of five, the library being opened anew for each."""
    return dict(_searched(folder / "library.db"))


def _searched(library: Path) -> Iterator[tuple[str, float]]:
    for kind, query in QUERIES.items():
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            index.search(library, query)
            taken.append(time.perf_counter() - began)
        yield kind, round(sorted(taken)[2] * 1000, 1)


_STAGES = {"make": _make, "start": _start, "index": _index, "index more": _index_more, "search": _search}

if __name__ == "__main__":
    main()
