"""A library of a million photos: how long a run takes to find that all is done, to index, and to search.

    python -m benchmarks.library [--count 1000000] [--folder DIR] [--captions FILE]

The photos are empty files, a thousand a folder, and have three captions each: drawn from a file with one a line, or
made up of words of the model in the box. Each stage is measured in a process of its own, which has read nothing before;
with `--folder`, the files and the library are kept for another time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
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
    "a word in many forms": "running",
    "two common words": "man dog",
    "a common and a rare word": "man zebra",
    "many words": "woman man people person",
    "words that never meet": "man zebra giraffe guitar",
    "or": "zebra OR giraffe",
    "or of common words": "man OR dog OR water",
    "not": "man NOT dog",
    "rare but for common words": "zebra NOT man",
    "brackets": '"red ball" (dog OR cat) NOT car',
    "words of grammar": "on the",
    "phrase": '"tennis racket"',
    "phrase with words of grammar": '"dog on a beach"',
    "long phrase": '"on top of a couch"',
    "phrase that is nowhere": '"man on the dog"',
    "phrase and word": 'man "a dog on the"',
    "phrase of words of grammar": '"in the a"',
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--stage", choices=_STAGES)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(_STAGES[arguments.stage](arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        found: dict[str, Any] = {}
        for stage in _STAGES:
            command = [sys.executable, "-m", "benchmarks.library", "--stage", stage, "--count", str(arguments.count)]
            command += ["--folder", str(folder)]
            command += ["--captions", str(arguments.captions)] if arguments.captions else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"{stage}: {done.stdout.strip()}", flush=True)
            found[stage] = json.loads(done.stdout)
    what = "photos that are done; seconds and, for queries, milliseconds of processor time"
    report(f"{arguments.count:,} {what}", ours=found)


def _job(folder: Path) -> Job:
    return Job(photos=(str(folder / "photos"),), output=folder / "library.db", quiet=True)


def _make(arguments: argparse.Namespace) -> float:
    """Make files and their captions, unless they are there."""
    folder, count = arguments.folder, arguments.count
    for first in range(0, count, 1000):
        place = folder / "photos" / f"{first // 1000:04}"
        if place.is_dir():
            continue
        place.mkdir(parents=True)
        for number in range(first, min(first + 1000, count)):
            (place / f"IMG_{number:07}.jpg").touch()
    return _caption(arguments)


def _caption(arguments: argparse.Namespace) -> float:
    """Caption the photos that have no captions yet; seconds."""
    chance = random.Random(0)
    said = arguments.captions.read_text("utf-8").splitlines() if arguments.captions else _sentences(chance)
    began = time.process_time()
    with Journal(arguments.folder / "library.db", {}) as journal:
        results: list[Result] = []
        for each in journal.todo(sources.find(_job(arguments.folder)), retry_failed=False, by_content=False):
            captions = [Found(chance.choice(said), -9.0, -1.0 - chance.random()) for _ in range(3)]
            results.append((each, captions, None, "2026-01-01T00:00:00+00:00"))
            if len(results) == 256:
                journal.record(results)
                results = []
        journal.record(results)
        journal.complete()
    return time.process_time() - began


def _sentences(chance: random.Random) -> list[str]:
    """Sentences of four words by Zipf's law, with words of grammar between them."""
    vocabulary = Vocabulary.load(PRETRAINED / "mini" / "tokenizer.json")
    known = [vocabulary.word_of(number) for number in range(len(vocabulary))]
    words = "man dog woman people water two grass standing running sitting white black street".split()
    words += [word for word in known if word.isalpha() and word not in words]

    def sentence() -> str:
        one, two, three, four = (words[int(len(words) ** chance.random()) - 1] for _ in range(4))
        return f"a {one} {chance.choice(['in a', 'on the', 'with'])} {two} {three} on the {four}"

    return [sentence() for _ in range(100_000)]


def _start(arguments: argparse.Namespace) -> float:
    """Find that all photos are done."""
    began = time.process_time()
    with Journal(arguments.folder / "library.db", {}) as journal:
        left = sum(1 for _ in journal.todo(sources.find(_job(arguments.folder)), retry_failed=False, by_content=False))
        journal.complete()
        assert (left, journal.counts.known) == (0, arguments.count)
    return time.process_time() - began


def _index(arguments: argparse.Namespace) -> float:
    """Index all captions."""
    with Journal(arguments.folder / "library.db", {}) as journal:
        journal._execute("DELETE FROM settings WHERE name='indexed'")
        journal._execute("DROP TABLE IF EXISTS search")
        began = time.process_time()
        index.build(journal)
        return time.process_time() - began


def _index_more(arguments: argparse.Namespace) -> float:
    """Index a photo more."""
    (arguments.folder / "photos" / "one more.jpg").touch()
    _caption(arguments)
    with Journal(arguments.folder / "library.db", {}) as journal:
        began = time.process_time()
        index.build(journal)
        taken = time.process_time() - began
    (arguments.folder / "photos" / "one more.jpg").unlink()
    _caption(arguments)
    with Journal(arguments.folder / "library.db", {}) as journal:
        journal._execute("DELETE FROM photos WHERE number NOT IN (SELECT number FROM places)")
    return taken


def _search(arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each kind of query; the median of five, the library being opened anew for each."""
    found = {}
    for kind, query in QUERIES.items():
        taken = []
        for _ in range(5):
            began = time.process_time()
            index.search(arguments.folder / "library.db", query)
            taken.append(time.process_time() - began)
        found[kind] = round(statistics.median(taken) * 1000, 1)
    return found


_STAGES = {"make": _make, "start": _start, "index": _index, "index more": _index_more, "search": _search}

if __name__ == "__main__":
    main()
