"""A library is searched by words as people type them, and its page shows what was found."""

import os
import random
import re
import sqlite3

import pytest
from fake import Fake, photo, provenance

from captioner.bulk import run
from captioner.bulk.gallery import page
from captioner.bulk.index import Hit, search, understood
from captioner.bulk.job import Job
from captioner.errors import CaptionerError
from captioner.model import Caption

TEXTS = [
    ("a dog runs on the beach", "two dogs playing"),
    ("a brown dog sits in a car", "a puppy"),
    ("a man on a beach with a surfboard", "a dog and a man"),
    ("a red bus on a street", "a bus"),
    ("two cats sleeping on a red couch", "cats"),
]


class Told(Fake):
    """A model that says a text for each photo."""

    def describe(self, features, options=None):
        return [[Caption(text, (), -1.0, -1.0, True, True) for text in TEXTS[round(float(row[0]))]] for row in features]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    for number in range(len(TEXTS)):
        photo(folder / "album" / f"{number}.png", number)
    job = Job(photos=(str(folder / "album"),), output=folder / "photos.db", quiet=True)
    run.run(job, Told(), provenance(num_captions=2))
    return folder / "photos.db"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("dog", [0, 1, 2]),  # 2 is last, for only its second caption has a dog
        ("dogs running", [0]),  # by their stems
        ("DOG on a Beach", [0, 2]),
        ('"dog runs"', [0]),
        ('"runs dog"', []),
        ('"on a red couch"', [4]),
        ("bus OR cats", [3, 4]),
        ("dog NOT car", [0, 2]),
        ("red (bus OR couch)", [3, 4]),
        ("(bus OR couch) red NOT street", [4]),
        ("puppy", [1]),
        ("elephant", []),
        ("dog's", []),
        ("a", [0, 1, 2, 3, 4]),
        ("a NOT dog", [2, 3, 4]),
        ("(the) OR bus", [0, 3]),
        ("best:dog", []),  # columns, wildcards and other signs of FTS5 are words
        ("dog*", [0, 1, 2]),
        ("NEAR(dog beach)", []),
    ],
)
def test_queries(library, query, expected):
    found = [int(re.search(r"(\d)\.png$", hit.path)[1]) for hit in search(library, query)]
    assert sorted(found) == expected
    if query == "dog":
        assert found[-1] == 2


def test_hits_say_where_and_what(library):
    (hit,) = search(library, "couch")
    assert hit == Hit(str(library.parent / "album/4.png"), str(library.parent / "album/4.png"), TEXTS[4][0])
    assert len(search(library, "dog", limit=2)) == 2


@pytest.mark.parametrize("query", ["", "  ", "()", "?!", '""', "OR"])
def test_queries_without_words(library, query):
    with pytest.raises(CaptionerError, match="has no words to search for; give some, such as: dog beach"):
        search(library, query)


@pytest.mark.parametrize("query", ["dog OR", "NOT dog", "(dog", "dog)", "dog OR NOT cat"])
def test_queries_that_cannot_be_understood(library, query):
    with pytest.raises(CaptionerError, match="cannot be understood; expected words"):
        search(library, query)


def test_queries_in_the_words_of_fts5():
    assert understood("a dog on the beach") == '"dog" AND "beach"'
    assert understood('"a dog" OR (cat car)') == '"a dog" OR ( "cat" AND "car" )'
    assert understood("the") == '"the"'
    assert understood("the dog OR (a) NOT on the beach") == '"dog" OR ( "a" ) NOT "beach"'


def test_a_library_that_is_none(tmp_path):
    path = tmp_path / "x.db"
    with pytest.raises(CaptionerError, match=r"x\.db: is no library; make one"):
        search(path, "dog")
    assert not path.exists()
    path.write_text("text")
    with pytest.raises(CaptionerError, match="is no library"):
        search(path, "dog")
    path.unlink()
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE photos (x)")
    base.close()
    with pytest.raises(CaptionerError, match="is no library"):
        search(path, "dog")


def test_the_index_follows_the_photos(tmp_path):
    album = tmp_path / "album"
    photo(album / "0.png", 0)
    job = Job(photos=(str(album),), output=tmp_path / "x.db", quiet=True)
    run.run(job, Told(), provenance())
    photo(album / "3.png", 3)
    (album / "0.png").unlink()
    run.run(job, Told(), provenance())
    assert search(tmp_path / "x.db", "dog") == []
    assert [hit.caption for hit in search(tmp_path / "x.db", "bus")] == [TEXTS[3][0]]


def rows_of(library):
    base = sqlite3.connect(library)
    (count,) = base.execute("SELECT COUNT(*) FROM search_docsize WHERE id % 2 = 0").fetchone()
    base.close()
    return count


def test_the_index_is_that_of_the_photos_that_are_there_whatever_happened_before(tmp_path):
    album, library = tmp_path / "album", tmp_path / "x.db"
    job = Job(photos=(str(album),), output=library, quiet=True)
    chance = random.Random(0)
    shown = {}  # photo -> number of its text
    for round_ in range(25):
        for _ in range(3 if round_ else 30):  # new photos, and others that change, some to what they were once
            number = chance.randrange(40)
            shown[number] = chance.randrange(len(TEXTS))
            photo(album / f"{number:02}.png", shown[number])
            os.utime(album / f"{number:02}.png", ns=(shown[number], shown[number]))
        if round_ % 3 == 1:
            gone = chance.choice(list(shown))
            (album / f"{gone:02}.png").rename(tmp_path / "gone.png")
            away = shown.pop(gone)
        elif round_ % 3 == 2 and not (album / f"{gone:02}.png").exists():
            (tmp_path / "gone.png").rename(album / f"{gone:02}.png")
            shown[gone] = away
        run.run(job, Told(), provenance(num_captions=2))
        for word in ("dog", "bus", "cats", "puppy"):
            found = sorted(int(hit.path[-6:-4]) for hit in search(library, word, 100))
            stem = word.rstrip("s")
            texts = {n for n, each in enumerate(TEXTS) if re.search(rf"\b{stem}", " ".join(each))}
            assert found == sorted(n for n, text in shown.items() if text in texts), (round_, word)
        assert len(shown) <= rows_of(library) <= 1.1 * len(shown) + 1


def test_only_new_captions_are_indexed(tmp_path):
    album, library = tmp_path / "album", tmp_path / "x.db"
    for number in range(30):
        photo(album / f"{number:02}.png", 0)
    job = Job(photos=(str(album),), output=library, quiet=True)
    run.run(job, Told(), provenance())
    base = sqlite3.connect(library)  # a word that would be lost if the index were made anew
    base.execute("INSERT INTO search (rowid, text) VALUES (3, 'canary')")
    base.commit()
    base.close()
    photo(album / "30.png", 3)
    run.run(job, Told(), provenance())
    assert [hit.path[-6:-4] for hit in search(library, "bus")] == ["30"]
    assert [hit.path[-6:-4] for hit in search(library, "canary")] == ["00"]
    for number in range(5):
        photo(album / f"{number:02}.png", 4)
        os.utime(album / f"{number:02}.png", ns=(1, 1))
    run.run(job, Told(), provenance())
    assert search(library, "canary") == []
    assert rows_of(library) == 31


def test_a_phrase_does_not_reach_from_one_caption_into_the_next(tmp_path):
    photo(tmp_path / "album" / "2.png", 2)
    job = Job(photos=(str(tmp_path / "album"),), output=tmp_path / "x.db", quiet=True)
    run.run(job, Told(), provenance(num_captions=2))
    assert len(search(tmp_path / "x.db", '"with a surfboard" "a dog"')) == 1
    assert search(tmp_path / "x.db", '"surfboard a dog"') == []


def test_the_page_is_whole_in_itself(tmp_path):
    good = photo(tmp_path / "a & <b>.png", 5)
    hits = [Hit(str(good), str(good), 'a "dog" <runs>'), Hit(str(tmp_path / "gone.jpg"), "gone.jpg", "a cat")]
    text = page("<dog>", hits)
    assert text.count("data:image/jpeg;base64,") == 1
    assert "&lt;dog&gt;" in text
    assert "a &quot;dog&quot; &lt;runs&gt;" in text
    assert "<runs>" not in text
    assert "a%20%26%20%3Cb%3E.png" in text
    assert "not readable any more" in text
    assert not re.search(r'(src|href)="https?:', text)
